"""The sizes that times are predicted for: a large batch of 16-bit elements."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = 16384
HEADS = 12
WINDOW = 64
ELEMENT = 2


@dataclass(frozen=True)
class Size:
    """What is computed.

    Attributes:
        rows: rows of the result that tiles are cut from, those of all heads together.
        keys: keys of a row's key tiles together.
        moved: bytes that have to be read and written, each once.
        operations: of the products, a multiplication and an addition counted as two.
    """

    name: str
    rows: int
    moved: int
    keys: int = 0
    operations: int = 0


def attention_size(head_dim: int, length: int, products: int = 2) -> Size:
    """q, k and v are read, the result is written; so many products of the size of q @ k.T."""
    rows = TOKENS * HEADS
    operations = 2 * products * rows * length * head_dim
    return Size(f"S={length}", rows, 4 * rows * head_dim * ELEMENT, length, operations)


def window_size(head_dim: int, length: int, tile: int = 64) -> Size:
    """A tile of rows touches the keys of the window around them."""
    rows = TOKENS * HEADS
    operations = 4 * rows * (2 * WINDOW + 1) * head_dim
    moved = 4 * rows * head_dim * ELEMENT
    return Size(f"S={length}, W={WINDOW}", rows, moved, tile + 2 * WINDOW, operations)


def row_size(width: int, tensors: int, rows: int = TOKENS) -> Size:
    """So many tensors of that width are read or written for each token."""
    return Size(f"N={width}", rows, tensors * TOKENS * width * ELEMENT)
