"""Attention within a window, over packed tokens.

attention.py's sum, over the keys of the query's sequence at most `window_size` rows away from it:

    out[i] = softmax(softmax_scale * q[i] @ k[j].T) @ v[j]     |i - j| <= window_size

A program holds BLOCK_M query rows of a sequence and walks over the key tiles that their windows
touch, and no others: at most (BLOCK_M + 2 * window_size - 2) // BLOCK_N + 2 of them, however long
the sequence is. The tiles that all of its rows see whole carry no mask; those at the two edges, and
the last one of a sequence where it is partial, go through a loop of their own.

    bytes        4 * S * D elements, as without a window
    operations   4 * S * (2 * window_size + 1) * D, and what the edge tiles waste

With a window of 64 to either side that is 64 operations a byte in half precision, far below what
the tensor cores would take: memory bandwidth is the bound, and neighbouring tiles find most of
their keys in L2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from encoder_fast.kernels.attention_tiles import (
    LARGE_SHARED_MEMORY,
    LOWEST,
    clear_tail,
    input_precision,
    next_weights,
    search_steps,
    sequence_of_tile,
    shared_memory,
    tile_grid,
    with_aligned_heads,
)
from encoder_fast.kernels.integers import next_power_of_2


@dataclass(frozen=True)
class LocalAttentionConfig:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Tiles of 64 rows: of the keys that a window of 64 touches, two thirds are seen; of 128 rows, half.
_HALF = LocalAttentionConfig(64, 64, 4, 2)

# Before Hopper the tensor cores take their operands from registers, and tiles have to be smaller.
_HALF_SMALL = LocalAttentionConfig(64, 32, 4, 2)

# float32 keeps more of it in registers still; what spills depends on the card.
_FLOAT32 = LocalAttentionConfig(16, 16, 4, 2)
_FLOAT32_WIDE_HEAD_SMALL = LocalAttentionConfig(16, 32, 8, 2)


def choose_config(head_dim: int, dtype: torch.dtype, shared_memory: int) -> LocalAttentionConfig:
    small = shared_memory < LARGE_SHARED_MEMORY
    if dtype != torch.float32:
        return _HALF_SMALL if small else _HALF
    return _FLOAT32_WIDE_HEAD_SMALL if small and head_dim > 64 else _FLOAT32


# As in attention.py, nothing that changes from batch to batch is specialised on.
@triton.jit(
    do_not_specialize=[
        *("total", "batch", "heads", "tiles_per_sequence", "search_steps", "window_size"),
    ],
    do_not_specialize_on_alignment=["p_cu_seqlens"],
)
def local_attention_kernel(
    p_out,
    p_q,
    p_k,
    p_v,
    p_cu_seqlens,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    window_size,
    total,
    batch,
    heads,
    tiles_per_sequence,
    search_steps,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    # Heads run fastest: neighbouring programs read neighbouring columns of the same rows.
    i_program = tl.program_id(0)
    i_tile = i_program // heads
    i_head = tl.cast(i_program % heads, tl.int64)
    n_tiles = tl.num_programs(0) // heads

    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < HEAD_DIM
    stride_out_row = tl.cast(heads, tl.int64) * HEAD_DIM
    p_out += i_head * HEAD_DIM + o_d

    begin, end, i_row = sequence_of_tile(
        p_cu_seqlens, i_tile, tiles_per_sequence, batch, search_steps, BLOCK_M
    )
    i_tail = tl.load(p_cu_seqlens + batch) + i_tile * BLOCK_M
    clear_tail(p_out, stride_out_row, m_d, i_tail, total, n_tiles * BLOCK_M, BLOCK_M)
    if i_row >= end:
        return

    o_q = tl.cast(i_row + o_m, tl.int64)[:, None]
    m_q = (o_q < end) & m_d
    p_q += i_head * stride_q_head + o_d
    b_q = tl.load(p_q + o_q * stride_q_row, mask=m_q, other=0.0)

    # From here on rows and keys count from the sequence's first token. Key tiles do too.
    n_keys = end - begin
    i_first = i_row - begin
    i_last = tl.minimum(i_first + BLOCK_M, n_keys) - 1
    tile_begin = tl.maximum(i_first - window_size, 0) // BLOCK_N
    tile_end = tl.minimum(i_last + window_size, n_keys - 1) // BLOCK_N + 1
    # Whole tiles within the window of the last row and of the first, and within the sequence.
    full_begin = tl.cdiv(tl.maximum(i_last - window_size, 0), BLOCK_N)
    full_end = tl.minimum(i_first + window_size + 1, n_keys) // BLOCK_N
    full_end = tl.maximum(full_end, full_begin)

    o_kv = tl.cast(begin + o_n, tl.int64)[:, None]
    p_k += i_head * stride_k_head + o_d + o_kv * stride_k_row
    p_v += i_head * stride_v_head + o_d + o_kv * stride_v_row
    stride_k_tile = tl.cast(BLOCK_N, tl.int64) * stride_k_row
    stride_v_tile = tl.cast(BLOCK_N, tl.int64) * stride_v_row

    # A row may see nothing of a tile at the edge.
    b_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    # 1. The tiles at both edges.
    o_from = i_first + o_m - window_size
    o_to = tl.minimum(i_first + o_m + window_size, n_keys - 1)
    n_left = full_begin - tile_begin
    for i_edge in range(0, n_left + tile_end - full_end):
        i_tile_k = tl.where(i_edge < n_left, tile_begin + i_edge, full_end + i_edge - n_left)
        o_key = i_tile_k * BLOCK_N + o_n
        m_kv = (o_key < n_keys)[:, None] & m_d
        b_k = tl.load(p_k + i_tile_k * stride_k_tile, mask=m_kv, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=INPUT_PRECISION)
        m_s = (o_key[None, :] >= o_from[:, None]) & (o_key[None, :] <= o_to[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_p, b_max, b_sum, b_acc = next_weights(b_s, b_max, b_sum, b_acc, scale_log2)
        b_v = tl.load(p_v + i_tile_k * stride_v_tile, mask=m_kv, other=0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=INPUT_PRECISION)

    # 2. The tiles between them, without a mask on the keys.
    p_k += full_begin * stride_k_tile
    p_v += full_begin * stride_v_tile
    for _ in range(full_begin, full_end):
        b_k = tl.load(p_k, mask=m_d, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=INPUT_PRECISION)
        b_p, b_max, b_sum, b_acc = next_weights(b_s, b_max, b_sum, b_acc, scale_log2)
        b_v = tl.load(p_v, mask=m_d, other=0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=INPUT_PRECISION)
        p_k += stride_k_tile
        p_v += stride_v_tile

    b_out = (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + o_q * stride_out_row, b_out, mask=m_q)


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    window_size: int,
) -> torch.Tensor:
    """softmax(softmax_scale * q @ k.T) @ v over the keys of each query's sequence at most
    `window_size` rows away: (total, H, D), contiguous.

    q, k, v: (total, H, D) in float16, bfloat16 or float32 with a last stride of 1; D up to 128.
    cu_seqlens: int32 (B + 1,). max_seqlen: no sequence is longer. softmax_scale: positive.
    Rows behind cu_seqlens[-1] come out as zeros. Nothing here waits for the device. Operands whose
    heads begin at no multiple of 16 bytes are copied first.
    """
    total, heads, head_dim = q.shape
    batch = cu_seqlens.numel() - 1
    if batch == 0:
        return q.new_zeros((total, heads, head_dim))
    out = torch.empty((total, heads, head_dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out

    q, k, v = with_aligned_heads(q), with_aligned_heads(k), with_aligned_heads(v)
    longest = max(1, min(max_seqlen, total))
    config = choose_config(head_dim, q.dtype, shared_memory(q.device))
    tiles_per_sequence, n_tiles = tile_grid(total, batch, longest, config.block_m)

    with torch.cuda.device_of(q):
        local_attention_kernel[(n_tiles * heads,)](
            out,
            q,
            k,
            v,
            cu_seqlens,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            # No sequence has farther keys, and a row plus a window stays within 32 bits.
            min(window_size, total),
            total,
            batch,
            heads,
            tiles_per_sequence,
            search_steps(batch),
            softmax_scale * math.log2(math.e),
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, next_power_of_2(head_dim)),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            INPUT_PRECISION=input_precision(q.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
