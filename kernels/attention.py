"""Variable-length, bidirectional attention over packed tokens.

For every sequence `b` and head `h`, with rows `cu_seqlens[b]` to `cu_seqlens[b + 1]` of q, k, v:

    out = softmax(softmax_scale * q @ k.T + bias) @ v          q, k, v, out: (total, H, D)

where the bias is optional and depends on the distance from query i to key j alone:
relative_bias[h, clamp(j - i, -R, R) + R], for relative_bias of shape (H, 2R + 1).

No S by S matrix is stored: a program holds a tile of BLOCK_M query rows and walks over the keys in
tiles of BLOCK_N (FlashAttention, arXiv 2205.14135). Scores stay in the units of q @ k.T; one fused
multiply-add a score turns them into the exponent of exp2, so softmax_scale must be positive. With
a bias they are scaled as it is added, by another fused multiply-add. A tile of scores needs
BLOCK_M + BLOCK_N - 1 values of it, one a diagonal.

Three ways to cut the tokens into query tiles; the launcher picks one from numbers the host has.
Two are told in attention_tiles.py. The third, for the shortest sequences, packs rows across them
(`PACK_ROWS`): a tile is BLOCK_M consecutive rows of the batch whatever they belong to, and each row
knows where its own keys begin and end.

Up to 128 keys the kernel is bound by memory bandwidth, so what counts there is many small programs
in flight. Beyond that it is bound by exponentials and by instruction issue as much as by the tensor
cores, so the loop over full key tiles carries no mask: the last tile, the only one that can be
partial, goes first and also saves the loop its start values. docs/kernels/attention.md has the
figures. local_attention.py has the kernel for keys within a window.
"""

from __future__ import annotations

import functools
import math
import sys
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from encoder_fast.kernels.attention_tiles import (
    LARGE_SHARED_MEMORY,
    LOWEST,
    clear_tail,
    input_precision,
    last_sequence_at_or_before,
    next_weights,
    search_steps,
    sequence_of_tile,
    shared_memory,
    tile_grid,
    with_aligned_heads,
)
from encoder_fast.kernels.integers import ceil_div, next_power_of_2
from encoder_fast.kernels.launch_table import tuned


@dataclass(frozen=True)
class AttentionConfig:
    """How one length class is launched. `one_key_tile` promises that BLOCK_N holds all keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    one_key_tile: bool = False
    pack_rows: bool = False


Ladder = tuple[tuple[int, AttentionConfig], ...]

# Rungs are (longest sequence the configuration may see, configuration). A packed tile of 64 rows
# reaches at most 31 keys to either side, so 128 keys hold all of them.
_BY_LONGEST: Ladder = (
    (32, AttentionConfig(64, 128, 4, 1, one_key_tile=True, pack_rows=True)),
    (64, AttentionConfig(64, 64, 4, 1, one_key_tile=True)),
    (128, AttentionConfig(64, 128, 4, 1, one_key_tile=True)),
)

# For longer batches the rungs are (mean length up to which it is chosen, configuration). Tiles of
# 128 rows halve the traffic for keys and values, tiles of 64 rows waste less of a short sequence.
_BY_MEAN: Ladder = (
    (160, AttentionConfig(64, 64, 4, 2)),
    (sys.maxsize, AttentionConfig(128, 64, 8, 3)),
)

# Before Hopper the tensor cores take their operands from registers, so that tiles have to be
# smaller not to spill: the packed ones, and with heads of more than 64 those of the loop.
_BY_LONGEST_SMALL: Ladder = (
    (16, AttentionConfig(32, 64, 4, 1, one_key_tile=True, pack_rows=True)),
    *_BY_LONGEST[1:],
)
_BY_MEAN_SMALL: Ladder = (
    (160, AttentionConfig(32, 32, 4, 2)),
    (sys.maxsize, AttentionConfig(128, 32, 8, 2)),
)

# float32 runs on the FMA units or as TF32, and either keeps more of it in registers still.
_FLOAT32: Ladder = ((sys.maxsize, AttentionConfig(16, 32, 4, 2)),)
_FLOAT32_WIDE_HEAD: Ladder = ((sys.maxsize, AttentionConfig(32, 16, 8, 2)),)


def ladders(
    head_dim: int, dtype: torch.dtype, shared_memory: int, biased: bool = False
) -> tuple[Ladder, Ladder]:
    """The rungs by longest and by mean length for a card with that many bytes for a block."""
    if dtype == torch.float32:
        return (), _FLOAT32_WIDE_HEAD if head_dim > 64 else _FLOAT32
    small = shared_memory < LARGE_SHARED_MEMORY
    # In a packed tile a bias takes registers that it lacks on any card.
    by_longest = _BY_LONGEST_SMALL if small or biased else _BY_LONGEST
    return by_longest, _BY_MEAN_SMALL if small and head_dim > 64 else _BY_MEAN


def choose_config(
    head_dim: int,
    dtype: torch.dtype,
    longest: int,
    mean: int,
    shared_memory: int,
    biased: bool = False,
) -> AttentionConfig:
    by_longest, by_mean = ladders(head_dim, dtype, shared_memory, biased)
    for limit, config in by_longest:
        if longest <= limit:
            return config
    return next(config for limit, config in by_mean if mean <= limit)


# Mean lengths that stand for a class of the launch table where keys are looped over, and where the
# next class begins: what is fastest for few steps of the loop may not be for many.
CLASS_LENGTHS = (256, 512, 1024, 4096)
_CLASS_ENDS = (384, 768, 1536)


def shape_class(head_dim: int, dtype: torch.dtype, config: AttentionConfig, mean: int) -> str:
    """The class of the launch table for what the ladders launch by `config` at a mean length."""
    if config.one_key_tile:
        keys = f"one tile of {config.block_n} keys"
    else:
        keys = f"a loop over about {CLASS_LENGTHS[bisect_left(_CLASS_ENDS, mean)]} keys"
    return f"D{head_dim}, {dtype.itemsize} bytes, {config.block_m} queries, {keys}"


@functools.cache
def _with_fields(config: AttentionConfig, fields: tuple[tuple[str, Any], ...]) -> AttentionConfig:
    return replace(config, **dict(fields))


def launch_config(
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype,
    longest: int,
    mean: int,
    biased: bool,
) -> AttentionConfig:
    """The configuration measured for this card, or else that of `choose_config`.

    The table says nothing of biases and packed rows. It may change tiles, warps and stages, and
    where one tile holds all keys it keeps it at least as wide.
    """
    config = choose_config(head_dim, dtype, longest, mean, shared_memory(device), biased)
    if biased or config.pack_rows:
        return config
    found = tuned("attention", shape_class(head_dim, dtype, config, mean), device)
    return config if found is None else _with_fields(config, tuple(found.items()))


@triton.jit
def _biased(b_s, p_bias, distance, reach, bias_scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Scores of a tile whose first key is `distance` rows behind its first query, with the bias.

    Each of its diagonals has one value. They are loaded once, clamped to the table, and from there
    on looked up by the place in the tile, in shared memory: a load a score would have a layout of
    its own, which Triton makes the whole softmax follow.
    """
    WIDTH: tl.constexpr = triton.next_power_of_2(BLOCK_M + BLOCK_N)
    o_distance = distance - (BLOCK_M - 1) + tl.arange(0, WIDTH)
    o_distance = tl.minimum(tl.maximum(o_distance + reach, 0), 2 * reach)
    b_diagonals = tl.load(p_bias + o_distance).to(tl.float32)
    o_diagonal = tl.arange(0, BLOCK_N)[None, :] - tl.arange(0, BLOCK_M)[:, None] + (BLOCK_M - 1)
    b_bias = tl.gather(b_diagonals, tl.reshape(o_diagonal, (BLOCK_M * BLOCK_N,)), 0)
    return tl.fma(b_s, bias_scale, tl.reshape(b_bias, (BLOCK_M, BLOCK_N)))


# Sizes that change from batch to batch must not be specialised, or a total that happens to divide
# by 16 would compile a second kernel on a user's call.
@triton.jit(
    do_not_specialize=[
        *("total", "batch", "heads", "tiles_per_sequence", "search_steps"),
        *("stride_bias_head", "reach"),
    ],
    do_not_specialize_on_alignment=["p_cu_seqlens"],
)
def attention_kernel(
    p_out,
    p_q,
    p_k,
    p_v,
    p_bias,
    p_cu_seqlens,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_bias_head,
    reach,
    total,
    batch,
    heads,
    tiles_per_sequence,
    search_steps,
    bias_scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_KEY_TILE: tl.constexpr,
    PACK_ROWS: tl.constexpr,
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
    p_q += i_head * stride_q_head + o_d
    p_k += i_head * stride_k_head + o_d
    p_v += i_head * stride_v_head + o_d
    if p_bias is not None:
        p_bias += i_head * stride_bias_head

    if PACK_ROWS:
        i_row = i_tile * BLOCK_M
        row_end = total
    else:
        key_begin, key_end, i_row = sequence_of_tile(
            p_cu_seqlens, i_tile, tiles_per_sequence, batch, search_steps, BLOCK_M
        )
        row_end = key_end
        i_tail = tl.load(p_cu_seqlens + batch) + i_tile * BLOCK_M
        clear_tail(p_out, stride_out_row, m_d, i_tail, total, n_tiles * BLOCK_M, BLOCK_M)
        if i_row >= row_end:
            return

    o_row = i_row + o_m
    o_q = tl.cast(o_row, tl.int64)[:, None]
    m_q = (o_q < row_end) & m_d
    b_q = tl.load(p_q + o_q * stride_q_row, mask=m_q, other=0.0)

    if PACK_ROWS:
        o_sequence = last_sequence_at_or_before(p_cu_seqlens, o_row, batch, search_steps, 1, 0)
        o_begin = tl.load(p_cu_seqlens + o_sequence)
        o_end = tl.load(p_cu_seqlens + o_sequence + 1)
        # Rows behind the last sequence get an empty range of keys, and so come out as zeros.
        o_end = tl.where(o_row < o_end, o_end, 0)
        key_begin = tl.min(tl.where(o_end > 0, o_begin, total))
        key_end = tl.max(o_end)

    # 1. The last key tile, the only one that can be partial.
    n_keys = key_end - key_begin
    n_before = 0 if ONE_KEY_TILE else (n_keys - 1) // BLOCK_N * BLOCK_N
    o_kv = tl.cast(key_begin + o_n, tl.int64)[:, None]
    p_k += o_kv * stride_k_row
    p_v += o_kv * stride_v_row
    n_skip = tl.cast(n_before, tl.int64)
    m_n = n_before + o_n < n_keys
    m_kv = m_n[:, None] & m_d
    b_k = tl.load(p_k + n_skip * stride_k_row, mask=m_kv, other=0.0)
    b_v = tl.load(p_v + n_skip * stride_v_row, mask=m_kv, other=0.0)

    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=INPUT_PRECISION)
    o_key = key_begin + o_n
    if p_bias is not None:
        b_s = _biased(
            b_s, p_bias, key_begin + n_before - i_row, reach, bias_scale, BLOCK_M, BLOCK_N
        )
    if PACK_ROWS:
        # A weight of 0 would still turn an infinite or NaN value of another sequence into NaN. Such
        # values are taken out, and come back as NaN scores that their own sequence alone sees.
        b_v_gap = b_v.to(tl.float32) - b_v.to(tl.float32)
        b_v = tl.where(b_v_gap == 0.0, b_v, 0.0)
        b_s += tl.sum(b_v_gap, 1)[None, :]
        m_s = (o_key[None, :] >= o_begin[:, None]) & (o_key[None, :] < o_end[:, None])
    else:
        m_s = m_n[None, :]
    b_s = tl.where(m_s, b_s, float("-inf"))
    # Scaled and rounded as it is subtracted: attention_tiles.next_weights says why.
    b_max = tl.maximum(tl.max(b_s, 1) * scale_log2, LOWEST)
    b_p = tl.exp2(tl.fma(b_s, scale_log2, -b_max[:, None]))
    b_sum = tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=INPUT_PRECISION)

    # 2. The full tiles before it, without a mask on the keys.
    if not ONE_KEY_TILE:
        step = tl.cast(BLOCK_N, tl.int64)
        for i_key in range(0, n_before, BLOCK_N):
            b_k = tl.load(p_k, mask=m_d, other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=INPUT_PRECISION)
            if p_bias is not None:
                b_s = _biased(
                    b_s, p_bias, key_begin + i_key - i_row, reach, bias_scale, BLOCK_M, BLOCK_N
                )
            b_p, b_max, b_sum, b_acc = next_weights(b_s, b_max, b_sum, b_acc, scale_log2)
            b_v = tl.load(p_v, mask=m_d, other=0.0)
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=INPUT_PRECISION)
            p_k += step * stride_k_row
            p_v += step * stride_v_row

    if PACK_ROWS:
        b_sum = tl.where(o_end > 0, b_sum, 1.0)
    b_out = (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + o_q * stride_out_row, b_out, mask=m_q)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    relative_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(softmax_scale * q @ k.T + bias) @ v within each sequence: (total, H, D), contiguous.

    q, k, v: (total, H, D) in float16, bfloat16 or float32 with a last stride of 1; D up to 128.
    cu_seqlens: int32 (B + 1,). max_seqlen: no sequence is longer. softmax_scale: positive.
    relative_bias: (H, 2R + 1), finite, with a last stride of 1; column R + d is added for the key d
    rows behind the query, and the outermost columns for those farther away than R.
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
    biased = relative_bias is not None
    config = launch_config(q.device, head_dim, q.dtype, longest, total // batch, biased)
    if config.pack_rows:
        tiles_per_sequence, n_tiles = 0, ceil_div(total, config.block_m)
    else:
        tiles_per_sequence, n_tiles = tile_grid(total, batch, longest, config.block_m)
    scale_log2 = softmax_scale * math.log2(math.e)

    with torch.cuda.device_of(q):
        attention_kernel[(n_tiles * heads,)](
            out,
            q,
            k,
            v,
            relative_bias,
            cu_seqlens,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            0 if relative_bias is None else relative_bias.stride(0),
            0 if relative_bias is None else relative_bias.shape[1] // 2,
            total,
            batch,
            heads,
            tiles_per_sequence,
            search_steps(batch),
            softmax_scale,
            # The bias is added to scaled scores.
            scale_log2 if relative_bias is None else math.log2(math.e),
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, next_power_of_2(head_dim)),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            ONE_KEY_TILE=config.one_key_tile,
            PACK_ROWS=config.pack_rows,
            INPUT_PRECISION=input_precision(q.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
