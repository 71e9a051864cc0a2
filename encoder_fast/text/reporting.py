"""What a :class:`TextEncoder` has done so far."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from types import FrameType

from encoder_fast.patching import Report


@dataclass(frozen=True, slots=True)
class TextReport:
    """What :meth:`TextEncoder.report` returns; ``print`` it.

    Attributes:
        model: the report of the patched model; empty where it could not be patched.
        refusal: why it could not be patched, or ``None``.
        texts, tokens: how many have run, special tokens counted.
        cut: how many texts were cut to what the model takes.
        packed_batches: batches without padding.
        padded_batches: batches through the model's own forward; ``model.fallbacks`` or ``refusal``
            says why.
        tokens_per_batch: the most that a batch holds.
    """

    model: Report
    refusal: str | None
    texts: int
    tokens: int
    cut: int
    packed_batches: int
    padded_batches: int
    tokens_per_batch: int

    def __str__(self) -> str:
        model = str(self.model) if self.refusal is None else f"not patched: {self.refusal}"
        return (
            f"{model}\n"
            f"{self.texts:,} texts, {self.cut:,} of them cut; {self.tokens:,} tokens\n"
            f"{self.packed_batches:,} batches without padding, {self.padded_batches:,} through "
            f"the original forward; up to {self.tokens_per_batch:,} tokens in a batch"
        )


def warn_caller(message: str) -> None:
    """Warn at the line outside this package that led here."""
    level = 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    # code that was put together by exec may have no name
    return frame.f_globals.get("__name__", "").startswith("encoder_fast.")
