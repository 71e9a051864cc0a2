"""What the attention kernels share: from a program to its rows, and one step of the softmax.

A program holds a tile of BLOCK_M query rows of one sequence and walks over that sequence's keys.
Sequences differ in length, so tiles find theirs in one of two ways; the launcher picks the smaller
grid from numbers the host has (`tile_grid`).

- A fixed number of tiles a sequence.
- Tile slots: sequence b owns the slots from cu_seqlens[b] // BLOCK_M + b on, which is always
  enough for its length and leaves at most one slot of a sequence empty, without a prefix sum.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from encoder_fast.kernels.integers import ceil_div

# Bytes for a block that tell the cards apart: 227 KB on Hopper and data-centre Blackwell, 99 to
# 163 KB on those before and on consumer cards.
LARGE_SHARED_MEMORY = 200 * 1024

# Where a row's maximum starts: float32's lowest finite number. A tile whose scores are all -inf
# then adds weights of 0, where -inf - -inf would be NaN. A row without any weight is 0 / 0.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """The bytes of shared memory that one block may have."""
    if device.type != "cuda":
        return LARGE_SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin


def with_aligned_heads(x: torch.Tensor) -> torch.Tensor:
    """(total, H, D) as it is where each head of each token begins at a multiple of 16 bytes, and
    Triton can see that, as in any projection of an encoder; else a copy. Without one a kernel would
    read an element at a time, 8 loads and addresses for one, and spill registers."""
    if x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def tile_grid(total: int, batch: int, longest: int, block_m: int) -> tuple[int, int]:
    """(tiles of each sequence, or 0 for slots; tiles in all)."""
    slots = total // block_m + batch
    plain = ceil_div(longest, block_m)
    return (plain, batch * plain) if batch * plain <= slots else (0, slots)


def search_steps(batch: int) -> int:
    """Halvings until one of `batch` candidates is left."""
    return (batch - 1).bit_length()


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies, after PyTorch's float32 matmul precision setting."""
    return "tf32" if dtype != torch.float32 or _allows_tf32() else "ieee"


def _allows_tf32() -> bool:
    # From PyTorch 2.9 on this setting tells of the older ones too, which raise once it was used.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:
        return torch.get_float32_matmul_precision() != "highest"
    return setting == "tf32"


@triton.jit
def last_sequence_at_or_before(
    p_cu_seqlens, target, batch, search_steps, TILE: tl.constexpr, SLOT: tl.constexpr
):
    # The last b in [0, batch) with cu_seqlens[b] // TILE + b * SLOT <= target. Taking the last one
    # passes over empty sequences. The upper steps hit lines that other programs have brought in.
    i_low = target * 0
    i_high = i_low + batch
    for _ in range(search_steps):
        i_middle = (i_low + i_high) // 2
        first = tl.load(p_cu_seqlens + i_middle) // TILE + i_middle * SLOT
        m_low = first <= target
        i_low = tl.where(m_low, i_middle, i_low)
        i_high = tl.where(m_low, i_high, i_middle)
    return i_low


@triton.jit
def sequence_of_tile(
    p_cu_seqlens, i_tile, tiles_per_sequence, batch, search_steps, BLOCK_M: tl.constexpr
):
    """(begin and end of the tile's sequence, the tile's first row), the row at or behind the end in
    a tile that has none."""
    if tiles_per_sequence > 0:
        i_sequence = i_tile // tiles_per_sequence
        i_local = i_tile % tiles_per_sequence
    else:
        i_sequence = last_sequence_at_or_before(
            p_cu_seqlens, i_tile, batch, search_steps, BLOCK_M, 1
        )
        i_local = i_tile - tl.load(p_cu_seqlens + i_sequence) // BLOCK_M - i_sequence
    begin = tl.load(p_cu_seqlens + i_sequence)
    end = tl.load(p_cu_seqlens + i_sequence + 1)
    return begin, end, begin + i_local * BLOCK_M


@triton.jit
def clear_tail(p_out, stride_out_row, m_d, i_begin, total, step, BLOCK_M: tl.constexpr):
    """Zeros for the tokens behind the last sequence, which belong to nobody: the programs share
    them out, most often none."""
    for i_clear in range(i_begin, total, step):
        o_clear = tl.cast(i_clear + tl.arange(0, BLOCK_M), tl.int64)[:, None]
        b_zero = tl.zeros((BLOCK_M, m_d.shape[1]), p_out.dtype.element_ty)
        tl.store(p_out + o_clear * stride_out_row, b_zero, mask=(o_clear < total) & m_d)


@triton.jit
def next_weights(b_s, b_max, b_sum, b_acc, scale_log2):
    """One more tile of scores: its weights, and maximum, sum and accumulator rescaled to them.

    The maximum is kept scaled and rounded, as it is subtracted. With a fused multiply-add its
    rounding is the same factor on a whole row, which the division at the end takes out again.
    """
    b_max_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_p = tl.exp2(tl.fma(b_s, scale_log2, -b_max_new[:, None]))
    b_rescale = tl.exp2(b_max - b_max_new)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    return b_p, b_max_new, b_sum, b_acc * b_rescale[:, None]
