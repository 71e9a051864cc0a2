"""LayerNorm of rows that are held in registers: how a row is cut, and the arithmetic on it.

    mean = sum(h) / N
    rstd = 1 / sqrt(sum((h - mean)²) / N + eps)
    y    = (h - mean) * rstd * weight + bias

A program normalises `rows` rows of N columns. Triton's tiles have power-of-two sides, and encoder
widths often don't (384, 768), so a row is not one tile with idle lanes but a tuple of equal tiles,
the pieces. A piece is what the lanes that share a row load with one 16-byte access each: 256
columns in half precision for a full warp. N=768 is three such pieces, N=384 three of 128 columns
with two rows to a warp; no lane is idle, and the compiler drops the column mask.

The piece also decides who reduces. Triton spreads the warps of a program over the columns of a tile
before it spreads them over rows, so one tile of 1024 columns would put four warps on each row and
send every reduction through shared memory. A piece no wider than a warp leaves them as shuffles.

Statistics are float32, from the registers: the mean, then the squares of what is left without it.
E[h²] - E[h]² would need one pass less, and lose every digit where the mean is large against the
deviation.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from encoder_fast.kernels.launch_table import tuned

ACCESS_BYTES = 16


@dataclass(frozen=True)
class RowTile:
    """How a program of `num_warps` warps holds its rows: `lanes` threads to a row."""

    lanes: int
    num_warps: int

    @property
    def rows(self) -> int:
        """Rows of a program, such that no thread works on two."""
        return 32 * self.num_warps // self.lanes

    def block_n(self, itemsize: int) -> int:
        """Columns of a piece for elements of `itemsize` bytes."""
        return self.lanes * ACCESS_BYTES // itemsize


# (largest N, tile). A thread holds at most 40 columns. In half precision up to N=1024 they fit in
# 64 registers, which leaves room for 32 warps a multiprocessor. Up to there no row leaves its warp.
ROW_TILES = (
    (64, RowTile(lanes=4, num_warps=4)),
    (128, RowTile(lanes=8, num_warps=4)),
    (384, RowTile(lanes=16, num_warps=4)),
    (1024, RowTile(lanes=32, num_warps=4)),
    (2560, RowTile(lanes=64, num_warps=4)),
    (5120, RowTile(lanes=128, num_warps=4)),
    (8192, RowTile(lanes=256, num_warps=8)),
)


def row_tile(N: int) -> RowTile:
    """The tile for rows of N columns: the first rung of `ROW_TILES` that reaches N."""
    for limit, tile in ROW_TILES:
        if limit >= N:
            return tile
    raise ValueError(f"N must be at most {ROW_TILES[-1][0]}, got {N}")


@functools.cache
def row_class(N: int, itemsize: int) -> str:
    """The shape class of the launch table: a rung of `ROW_TILES` and the bytes of an element."""
    limit = next(limit for limit, _ in ROW_TILES if limit >= N)
    return f"N<={limit}, {itemsize} bytes"


def tile_for(kernel: str, N: int, itemsize: int, align: int, device: torch.device) -> RowTile:
    """The tile measured for this card, or else that of `row_tile`; `align` is from `row_align`."""
    if align * itemsize < ACCESS_BYTES:
        # More accesses, each with an address: with as many columns to a thread as in wide ones
        # some kernels spill registers.
        return row_tile(min(2 * N, ROW_TILES[-1][0]))
    tile = row_tile(N)
    config = tuned(kernel, row_class(N, itemsize), device)
    return tile if config is None else RowTile(config["lanes"], config["num_warps"])


def row_align(itemsize: int, *offsets: int) -> int:
    """Elements by which rows are sure to be aligned; those of one access are enough.

    offsets: in elements, all strides between rows (N of an output) and addresses of first rows.
    """
    return math.gcd(ACCESS_BYTES // itemsize, *offsets)


def address(x: torch.Tensor | None, itemsize: int) -> int:
    """Of the first row, in elements; one that is not there lies as any other does."""
    return 0 if x is None else x.data_ptr() // itemsize


@triton.jit
def aligned(stride, ROW_ALIGN: tl.constexpr):
    """The stride unchanged, and known to the compiler as a multiple of ROW_ALIGN.

    Of an integer argument Triton notices that it is a multiple of 16, not of 8: without this, half
    precision rows of N=312 would be read two bytes at a time.
    """
    return stride // ROW_ALIGN * ROW_ALIGN


@triton.jit
def piece_columns(i_piece: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns of a piece, (BLOCK_M, BLOCK_N): each row the same.

    Whatever is read by these columns, be it one vector for all rows, is read by each thread for
    itself in the layout of the rows. Read as (1, BLOCK_N), the vectors would get a layout of their
    own and pass through shared memory, behind two barriers for each piece of each vector.
    """
    o_n = i_piece * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return tl.broadcast_to(o_n, (BLOCK_M, BLOCK_N))


@triton.jit
def centre(b_pieces, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pieces less the mean of their row, and zeros beyond column N, where zeros must be."""
    b_sum = b_pieces[0]
    for i_piece in tl.static_range(1, len(b_pieces)):
        b_sum += b_pieces[i_piece]
    b_mean = tl.sum(b_sum, axis=1, keep_dims=True) * (1.0 / N)

    b_centred = ()
    for i_piece in tl.static_range(len(b_pieces)):
        m_n = piece_columns(i_piece, BLOCK_M, BLOCK_N) < N
        b_centred = b_centred + (tl.where(m_n, b_pieces[i_piece] - b_mean, 0.0),)
    return b_centred


@triton.jit
def layer_norm_row(
    b_pieces,
    p_weight,
    p_bias,
    b_eps,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Normalise the float32 pieces of rows of N columns; what lies beyond column N must be zero.

    `p_weight` and `p_bias` may be None, `b_eps` is a scalar or (BLOCK_M, 1). Returns the pieces of
    y, in float32.
    """
    b_centred = centre(b_pieces, N, BLOCK_M, BLOCK_N)
    # Once more, for the first mean was rounded at its own magnitude, and what is left of that would
    # be divided by a deviation that may be far smaller: a constant row could come out as 1, not 0.
    b_centred = centre(b_centred, N, BLOCK_M, BLOCK_N)

    b_squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_piece in tl.static_range(len(b_pieces)):
        b_squares += b_centred[i_piece] * b_centred[i_piece]
    b_rstd = tl.rsqrt(tl.sum(b_squares, axis=1, keep_dims=True) * (1.0 / N) + b_eps)

    b_y = ()
    for i_piece in tl.static_range(len(b_pieces)):
        o_n = piece_columns(i_piece, BLOCK_M, BLOCK_N)
        b_h = b_centred[i_piece] * b_rstd
        if p_weight is not None:
            b_h *= tl.load(p_weight + o_n, mask=o_n < N, other=0.0).to(tl.float32)
        if p_bias is not None:
            b_h += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)
        b_y = b_y + (b_h,)
    return b_y
