"""Which part of a text each of its rows carries: one for a short text, windows for a long one.

A window knows which of its tokens are its own. Neighbouring windows overlap, so that each token
has context on both sides in one of them; the middle of the overlap divides what is whose, and every
token of the text is some window's own exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

OVERLAP = 8
"""Neighbouring windows share at least one token in ``OVERLAP``."""

LONG_TEXT = ("truncate", "chunk", "error")


class TextTooLongError(ValueError):
    """A text is longer than the model takes, and ``long_text="error"`` forbids to cut it.

    Attributes:
        index: the text's place among those that were given.
        tokens: how many it has.
        room: how many fit.
    """

    def __init__(self, index: int, tokens: int, room: int) -> None:
        super().__init__(
            f"texts[{index}] has {tokens} tokens and {room} fit: long_text may be 'truncate' or "
            "'chunk'"
        )
        self.index, self.tokens, self.room = index, tokens, room


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``start:stop`` of a text, of which ``own_start:own_stop`` are counted as this one's.

    Attributes:
        text: the text's place among those that were planned together.
    """

    text: int
    start: int
    stop: int
    own_start: int
    own_stop: int

    @property
    def weight(self) -> int:
        """How many tokens are its own."""
        return self.own_stop - self.own_start


def spans(count: int, size: int) -> list[tuple[int, int]]:
    """Windows of ``size`` tokens that cover ``count``, evenly spread so that none is a stump."""
    if count <= size:
        return [(0, count)]
    step = size - size // OVERLAP
    number = 1 + -(-(count - size) // step)
    starts = np.linspace(0, count - size, number).round().astype(int).tolist()
    return [(start, start + size) for start in starts]


def windows(text: int, count: int, size: int) -> list[Window]:
    """The windows of one text of ``count`` tokens, in order."""
    pairs = spans(count, size)
    # A token between two windows' ends belongs to the window whose edge is further from it.
    borders = [(last[1] + following[0]) // 2 for last, following in pairwise(pairs)]
    own = zip([0, *borders], [*borders, count], strict=True)
    return [
        Window(text, start, stop, own_start, own_stop)
        for (start, stop), (own_start, own_stop) in zip(pairs, own, strict=True)
    ]


def truncated(text: int, count: int, size: int, side: str) -> Window:
    """The window that is left of a text when it is cut to ``size`` tokens."""
    kept = min(count, size)
    start = count - kept if side == "left" else 0
    return Window(text, start, start + kept, start, start + kept)


def longest_first(first: int, second: int, room: int) -> int:
    """What is left of the first of two texts when the longer gives way until both fit ``room``.

    This is the strategy ``longest_first`` of Hugging Face's tokenizers.
    """
    if first + second <= room:
        return first
    if first <= second:
        return min(first, room // 2)
    return max(room - second, room - room // 2)
