"""Variable-length disentangled attention (DeBERTa, arXiv 2006.03654) over packed tokens.

For every sequence and head, for query i and key j of that sequence:

    s[i, j] = q_i · k_j  +  q_i · pos_key[row(i - j)]  +  k_j · pos_query[row(i - j)]
    out     = softmax(softmax_scale * s) @ v

q, k, v, out: (total, H, D); pos_key, pos_query: (rows, H, D), either may be missing. row(d) is
`row_of_distance[clamp(d, -R, R) + R]`, a vector of 2R + 1, so that DeBERTa's logarithmic buckets,
its clamped distances and anything else are one kernel.

Neither an S by S matrix nor a (total, H, rows) tensor is stored. A tile of 32 queries and 32 keys
needs 63 distances, so its position scores are in two small products on the tensor cores:

    c[i, x] = q_i · pos_key[row(i0 - j0 - x)]      by query and by the key's offset to the tile
    p[y, j] = pos_query[row(i0 - j0 + y)] · k_j    by the query's offset to the tile and by key

and the tile wants them sheared: c[t, l - t] and p[t - l, l]. Chunks of 32 distances make that one
exchange inside a warp. Of the two chunks that row t needs, the lane that holds x sends its value
of the one chunk to columns right of the diagonal, or of the other to columns left of it, never
both, so a select picks first and one shuffle an element moves it ((l - t) mod 32).

Along the keys the chunks of c repeat, shifted by one: each step computes one chunk anew and carries
the rest. p has another key in every step; there the rows of pos_query are carried. Both terms are
scaled before they are rounded to the input's dtype for the exchange, where the original rounds them
unscaled. docs/kernels/disentangled_attention.md has the arithmetic and what it was chosen over.
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
    search_steps,
    sequence_of_tile,
    shared_memory,
    tile_grid,
    with_aligned_heads,
)
from encoder_fast.kernels.integers import next_power_of_2


@dataclass(frozen=True)
class DisentangledConfig:
    """How one length class is launched.

    `chunk` is the number of keys in a tile and of distances in a chunk, at most the 32 lanes of a
    warp. `block_m`, the number of queries, is one or two chunks.
    """

    block_m: int
    chunk: int
    num_warps: int
    num_stages: int


_TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])

# Two groups of 32 rows feed the warpgroup instructions of Hopper and later, and share keys, values
# and positions. Before, the tensor cores take operands from registers, which two groups overflow.
_SHORT = DisentangledConfig(32, 32, 4, 2)
# Triton 3.4 can't compile the two for Blackwell.
_LONG = DisentangledConfig(64, 32, 4, 2) if _TRITON >= (3, 5) else _SHORT
_WIDE_HEAD = DisentangledConfig(32, 32, 8, 1)

# Five products of float32 operands on the FMA units fill the registers with tiles of 16 by 16.
_FLOAT32 = DisentangledConfig(16, 16, 8, 2)


def configs(
    head_dim: int, dtype: torch.dtype, shared_memory: int
) -> tuple[DisentangledConfig, DisentangledConfig]:
    """For sequences of at most a chunk, and for longer ones, by a block's bytes on the card."""
    if dtype == torch.float32:
        return _FLOAT32, _FLOAT32
    if head_dim > 64:
        return _WIDE_HEAD, _WIDE_HEAD
    return _SHORT, _LONG if shared_memory >= LARGE_SHARED_MEMORY else _SHORT


@triton.jit
def _load_rows(p_pos, p_row, distance, reach, stride_row, m_d):
    # The table's rows for a vector of distances, a head's columns of them.
    o_row = tl.load(p_row + tl.minimum(tl.maximum(distance + reach, 0), 2 * reach))
    return tl.load(p_pos + tl.cast(o_row, tl.int64)[:, None] * stride_row, mask=m_d, other=0.0)


@triton.jit
def _exchange(b_x, o_from, AXIS: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):
    # A gather within each group of rows. Over all rows at once it would take more shuffles: one
    # for each of the registers that a lane's value may come from, and a select.
    groups: tl.constexpr = (BLOCK_M // CHUNK, CHUNK, CHUNK)
    b_x = tl.gather(tl.reshape(b_x, groups), tl.reshape(o_from, groups), AXIS)
    return tl.reshape(b_x, (BLOCK_M, CHUNK))


# Sizes that change from batch to batch must not be specialised, or a total that happens to divide
# by 16 would compile a second kernel on a user's call.
@triton.jit(
    do_not_specialize=["total", "batch", "heads", "tiles_per_sequence", "search_steps", "reach"],
    do_not_specialize_on_alignment=["p_cu_seqlens", "p_row"],
)
def disentangled_attention_kernel(
    p_out,
    p_q,
    p_k,
    p_v,
    p_pos_key,
    p_pos_query,
    p_row,
    p_cu_seqlens,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_pos_key_row,
    stride_pos_key_head,
    stride_pos_query_row,
    stride_pos_query_head,
    total,
    batch,
    heads,
    tiles_per_sequence,
    search_steps,
    reach,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_POS_KEY: tl.constexpr,
    HAS_POS_QUERY: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    # Tiles run fastest: neighbouring programs share a head's rows of the position tables.
    n_tiles = tl.num_programs(0) // heads
    i_tile = tl.program_id(0) % n_tiles
    i_head = tl.cast(tl.program_id(0) // n_tiles, tl.int64)

    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, CHUNK)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < HEAD_DIM
    stride_out_row = tl.cast(heads, tl.int64) * HEAD_DIM
    p_out += i_head * HEAD_DIM + o_d
    p_q += i_head * stride_q_head + o_d
    p_k += i_head * stride_k_head + o_d
    p_v += i_head * stride_v_head + o_d
    p_pos_key += i_head * stride_pos_key_head + o_d
    p_pos_query += i_head * stride_pos_query_head + o_d

    begin, end, i_row = sequence_of_tile(
        p_cu_seqlens, i_tile, tiles_per_sequence, batch, search_steps, BLOCK_M
    )
    i_tail = tl.load(p_cu_seqlens + batch) + i_tile * BLOCK_M
    clear_tail(p_out, stride_out_row, m_d, i_tail, total, n_tiles * BLOCK_M, BLOCK_M)
    if i_row >= end:
        return
    n_keys = end - begin
    i_query = i_row - begin

    o_query = tl.cast(begin + i_query + o_m, tl.int64)[:, None]
    m_q = (i_query + o_m < n_keys)[:, None] & m_d
    b_q = tl.load(p_q + o_query * stride_q_row, mask=m_q, other=0.0)
    o_key = tl.cast(begin + o_n, tl.int64)[:, None]
    p_k += o_key * stride_k_row
    p_v += o_key * stride_v_row

    # Row t of its group and lane s: right of the diagonal where s + t stays within the chunk.
    o_t = o_m % CHUNK
    m_right = o_t[:, None] + o_n[None, :] < CHUNK
    m_upper = (o_m < CHUNK)[:, None]
    o_shear_c = (o_n[None, :] - o_t[:, None]) & (CHUNK - 1)
    o_shear_p = (o_t[:, None] - o_n[None, :]) & (CHUNK - 1)

    if HAS_POS_KEY:
        b_rows = _load_rows(p_pos_key, p_row, i_query + CHUNK - o_n, reach, stride_pos_key_row, m_d)
        b_c = tl.dot(b_q, tl.trans(b_rows), input_precision=INPUT_PRECISION) * scale_log2
        b_left = b_c.to(b_q.dtype)
        if BLOCK_M > CHUNK:
            b_c_before = b_left
            b_rows = _load_rows(
                p_pos_key, p_row, i_query + 2 * CHUNK - o_n, reach, stride_pos_key_row, m_d
            )
            b_c = tl.dot(b_q, tl.trans(b_rows), input_precision=INPUT_PRECISION) * scale_log2
            b_left = tl.where(m_upper, b_left, b_c.to(b_q.dtype))
    if HAS_POS_QUERY:
        b_pq_right = _load_rows(p_pos_query, p_row, i_query + o_m, reach, stride_pos_query_row, m_d)

    b_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    step = tl.cast(CHUNK, tl.int64)
    for i_key in range(0, n_keys, CHUNK):
        m_n = i_key + o_n < n_keys
        m_kv = m_n[:, None] & m_d
        b_k = tl.load(p_k, mask=m_kv, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=INPUT_PRECISION) * scale_log2
        if HAS_POS_KEY:
            b_rows = _load_rows(
                p_pos_key, p_row, i_query - i_key - o_n, reach, stride_pos_key_row, m_d
            )
            b_c = tl.dot(b_q, tl.trans(b_rows), input_precision=INPUT_PRECISION) * scale_log2
            b_c_right = b_c.to(b_q.dtype)
            b_right = b_c_right
            if BLOCK_M > CHUNK:
                # The lower group of rows is one chunk further to the left.
                b_right = tl.where(m_upper, b_c_right, b_c_before)
                b_c_before = b_c_right
            b_exchanged = tl.where(m_right, b_right, b_left)
            # What was right of the diagonal is left of the next tile's. (Carrying a chunk over two
            # steps instead would keep Triton from loading ahead.)
            b_left = b_right
            b_s += _exchange(b_exchanged, o_shear_c, 2, BLOCK_M, CHUNK)
        if HAS_POS_QUERY:
            b_pq_left = _load_rows(
                p_pos_query, p_row, i_query - i_key - CHUNK + o_m, reach, stride_pos_query_row, m_d
            )
            b_p = tl.dot(b_pq_right, tl.trans(b_k), input_precision=INPUT_PRECISION)
            b_p_left = tl.dot(b_pq_left, tl.trans(b_k), input_precision=INPUT_PRECISION)
            b_pq_right = b_pq_left
            b_p = (tl.where(m_right, b_p, b_p_left) * scale_log2).to(b_q.dtype)
            b_s += _exchange(b_p, o_shear_p, 1, BLOCK_M, CHUNK)
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))

        b_max_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_weight = tl.exp2(b_s - b_max_new[:, None])
        b_rescale = tl.exp2(b_max - b_max_new)
        b_sum = b_sum * b_rescale + tl.sum(b_weight, 1)
        b_acc = b_acc * b_rescale[:, None]
        b_v = tl.load(p_v, mask=m_kv, other=0.0)
        b_acc = tl.dot(b_weight.to(b_v.dtype), b_v, b_acc, input_precision=INPUT_PRECISION)
        b_max = b_max_new
        p_k += step * stride_k_row
        p_v += step * stride_v_row

    b_out = (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + o_query * stride_out_row, b_out, mask=m_q)


def disentangled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pos_key: torch.Tensor | None,
    pos_query: torch.Tensor | None,
    row_of_distance: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
) -> torch.Tensor:
    """Attention with the scores of content and relative position: (total, H, D), contiguous.

    q, k, v: (total, H, D) in float16, bfloat16 or float32 with a last stride of 1; D up to 128.
    pos_key, pos_query: (rows, H, D) in q's dtype, last stride 1, or None.
    row_of_distance: int32 (2R + 1,), contiguous, rows of the tables. cu_seqlens: int32 (B + 1,).
    max_seqlen: no sequence is longer. softmax_scale: positive.
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
    short, long = configs(head_dim, q.dtype, shared_memory(q.device))
    config = short if longest <= short.chunk else long
    tiles_per_sequence, n_tiles = tile_grid(total, batch, longest, config.block_m)
    # A table that is not there is never read; any tensor stands in for its pointer and strides.
    key_table = q if pos_key is None else with_aligned_heads(pos_key)
    query_table = q if pos_query is None else with_aligned_heads(pos_query)
    with torch.cuda.device_of(q):
        disentangled_attention_kernel[(n_tiles * heads,)](
            out,
            q,
            k,
            v,
            key_table,
            query_table,
            row_of_distance,
            cu_seqlens,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            key_table.stride(0),
            key_table.stride(1),
            query_table.stride(0),
            query_table.stride(1),
            total,
            batch,
            heads,
            tiles_per_sequence,
            search_steps(batch),
            row_of_distance.numel() // 2,
            softmax_scale * math.log2(math.e),
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, next_power_of_2(head_dim)),
            BLOCK_M=config.block_m,
            CHUNK=config.chunk,
            HAS_POS_KEY=pos_key is not None,
            HAS_POS_QUERY=pos_query is not None,
            INPUT_PRECISION=input_precision(q.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
