"""From texts to vectors, labels, entities and rankings: :class:`TextEncoder`."""

from encoder_fast.text.encoder import TextEncoder

__all__ = ["TextEncoder"]
