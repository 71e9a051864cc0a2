"""Rotary position embedding of the queries and keys in a packed projection, in place.

    y1 = x1 * cos - x2 * sin        x1 the first half of a head's features, x2 the second
    y2 = x2 * cos + x1 * sin

    qkv        (total, 3, H, D), fp16, bf16 or fp32, contiguous; the values, qkv[:, 2], stay
    cos, sin   (total, D / 2), fp32, contiguous: one row a token, for all its heads

Each element of q and k is read once and written once, 4 bytes an element in half precision; the
tables are a 2 * H-th of that and come out of the cache from a token's second head on. At 6 floating
point operations for two elements memory bandwidth is the bound. docs/kernels/rotary.md has the
bytes, and why this is a kernel by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from encoder_fast.kernels.integers import ceil_div, next_power_of_2

# Elements of each half that a program holds: 8 for each thread, in half precision one access.
HALF_TILE = 1024


@dataclass(frozen=True)
class HeadTile:
    """How a program holds its heads: `rows` of them, a row being one head of one token."""

    rows: int
    block_d: int
    num_warps: int = 4


def head_tile(head_dim: int) -> HeadTile:
    """The tile for heads of an even number of features."""
    block_d = next_power_of_2(head_dim // 2)
    return HeadTile(max(1, HALF_TILE // block_d), block_d)


@triton.jit(do_not_specialize=["total"])
def rotary_kernel(
    p_qkv,
    p_cos,
    p_sin,
    total,
    H: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    # q and k lie side by side: 2 * H heads of a token, and then H of v.
    o_token = o_m // (2 * H)
    o_head = o_m % (2 * H)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (o_token < total) & (o_d < HALF_DIM)

    p_first = p_qkv + o_token * (6 * H * HALF_DIM) + o_head * (2 * HALF_DIM) + o_d
    p_second = p_first + HALF_DIM
    b_first = tl.load(p_first, mask=mask, other=0.0).to(tl.float32)
    b_second = tl.load(p_second, mask=mask, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos + o_token * HALF_DIM + o_d, mask=mask, other=0.0)
    b_sin = tl.load(p_sin + o_token * HALF_DIM + o_d, mask=mask, other=0.0)

    b_y = b_first * b_cos - b_second * b_sin
    tl.store(p_first, b_y.to(p_qkv.dtype.element_ty), mask=mask)
    b_y = b_second * b_cos + b_first * b_sin
    tl.store(p_second, b_y.to(p_qkv.dtype.element_ty), mask=mask)


def rotary(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn qkv[:, 0] and qkv[:, 1] in place; all three tensors are contiguous."""
    total, _, H, D = qkv.shape
    if total == 0:
        return
    tile = head_tile(D)
    with torch.cuda.device_of(qkv):
        rotary_kernel[(ceil_div(total * 2 * H, tile.rows),)](
            qkv,
            cos,
            sin,
            total,
            H=H,
            HALF_DIM=D // 2,
            BLOCK_M=tile.rows,
            BLOCK_D=tile.block_d,
            num_warps=tile.num_warps,
        )
