"""``encoder-fast info``."""

from __future__ import annotations


def info() -> None:
    """Show versions, devices and backends, and why one is missing.

    \b
    Example:
      encoder-fast info
    """
    import encoder_fast

    print(encoder_fast.info())
