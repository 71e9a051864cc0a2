"""Reading what the caller gives: a string, a list, or an iterator of any length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

# The first block is small, for nothing else can be done while it is tokenised. Later ones are
# large enough that sorting them by length pays, and small enough to be held.
FIRST_BLOCK, LARGEST_BLOCK = 64, 4096
BLOCK_CHARACTERS = 4_000_000

_SURROGATES = re.compile("[\ud800-\udfff]")


def check_iterable(texts: Any) -> None:
    """Raise ``TypeError`` unless ``texts`` is an iterable that can hold strings."""
    if isinstance(texts, (bytes, bytearray)) or not isinstance(texts, Iterable):
        raise TypeError(
            f"texts must be a string or an iterable of strings, got {type(texts).__name__}"
        )


def blocks(texts: Iterable[str], fixed: int | None = None) -> Iterator[list[str]]:
    """Texts by the block, in order.

    Args:
        fixed: texts in a block; where ``None``, few in the first and more and more in later ones.

    Raises:
        TypeError: one of them is no string; the message names its index.
    """
    size, block, characters = fixed or FIRST_BLOCK, [], 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] is a {type(text).__name__}, not a string")
        block.append(encodable(text))
        characters += len(text)
        if len(block) == size or characters >= BLOCK_CHARACTERS:
            yield block
            size, block, characters = fixed or min(2 * size, LARGEST_BLOCK), [], 0
    if block:
        yield block


def encodable(text: str) -> str:
    """``text`` with U+FFFD for each lone surrogate, which UTF-8 and so a tokenizer can't take.

    One character for one: offsets into the result are offsets into ``text``.
    """
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)
