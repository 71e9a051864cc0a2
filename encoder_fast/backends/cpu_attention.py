"""Attention on the CPU: PyTorch's SDPA and whole GEMMs, sequence by sequence.

Runs of neighbours of equal length go together; nothing is padded. What is added to the scores, a
bias by distance or the edges of a window, never takes a tensor as large as the scores:

- A bias is the same along every diagonal. With the queries in reverse order it is the same along
  every antidiagonal, and then it is a view of one vector of ``2 · length - 1`` values, whose two
  last strides are both 1. SDPA and ``baddbmm`` read it as it is, at no cost that can be measured.
- With a window, a block of queries meets only the slice of keys that it can see, and all blocks
  share one mask: time and memory grow with ``length · window_size``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder_fast.backends.onednn import has_onednn

# At these lengths one sequence goes through whole GEMMs, as many heads at a time as have their
# scores within this many bytes. It took 0.5 to 0.9 times as long as PyTorch's flash kernel, which
# multiplies in blocks of 32 or 64 queries.
_CACHED_SCORES = {torch.float32: range(1, 193), torch.bfloat16: range(96, 2049)}
_SCORES_BYTES = 8 << 20

# Several sequences of one length below this are better off in one call of the flash kernel.
_TOGETHER_BELOW = 48

# Queries that share a slice of keys in a window. For windows of 64 and 256, blocks of 64 and 256
# took 0.9 to 1.4 times as long in float32, 1.0 to 1.3 times in bfloat16.
_WINDOW_BLOCK = 128

# As many scores of such a block as stay in the cache go through GEMMs, more through SDPA. PyTorch's
# GEMM in float16 is many times slower than its flash kernel.
_WINDOW_SCORES = 4 << 20
_WINDOW_GEMM = (torch.float32, torch.bfloat16)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    window_size: int | None = None,
    relative_bias: Tensor | None = None,
) -> Tensor:
    total, num_heads, head_size = q.shape
    out = q.new_empty(total, num_heads, head_size)
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    batch_size, longest = len(lengths), max(lengths, default=0)
    window = edges = by_distance = None
    if window_size is not None and longest > window_size + 1:
        window, edges = window_size, _window_edges(q, window_size)
    if relative_bias is not None and longest:
        by_distance = _by_distance(relative_bias, longest)
    first = 0
    while first < batch_size:
        length = lengths[first]
        last = first + 1
        while last < batch_size and lengths[last] == length:
            last += 1
        alone = last - first == 1 or length >= _TOGETHER_BELOW
        same_dtype = relative_bias is None or relative_bias.dtype == q.dtype
        bias = None if by_distance is None else _reversed_bias(by_distance, length)
        if window is not None and edges is not None and length > window + 1:
            for start in bounds[first:last]:
                rows = slice(start, start + length)
                _attend_in_window(
                    q[rows], k[rows], v[rows], softmax_scale, window, edges, out[rows]
                )
        elif alone and same_dtype and _goes_by_gemms(q.dtype, length):
            for start in bounds[first:last]:
                rows = slice(start, start + length)
                queries = q[rows] if bias is None else q[rows].flip(0)
                context = _attend_in_cache(queries, k[rows], v[rows], softmax_scale, bias)
                out[rows].copy_(context if bias is None else context.flip(0))
        elif length:
            rows = slice(bounds[first], bounds[last])
            shape = (last - first, length, num_heads, head_size)
            queries, keys, values = (x[rows].view(shape) for x in (q, k, v))
            if bias is not None:
                queries = queries.flip(1)
            context = _sdpa(queries, keys, values, softmax_scale, bias)
            out[rows].view(shape).copy_(context if bias is None else context.flip(1))
        first = last
    # a bucketed batch may carry tokens that belong to no sequence
    if bounds[-1] < total:
        out[bounds[-1] :].zero_()
    return out


def _goes_by_gemms(dtype: torch.dtype, length: int) -> bool:
    # Without instructions for bfloat16 PyTorch's GEMM is a plain loop.
    return length in _CACHED_SCORES.get(dtype, ()) and has_onednn(dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """``(sequences, length, H, D)``, as the result."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask.expand(1, q.shape[1], -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _attend_in_cache(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """One sequence, ``(length, H, D)``, by whole GEMMs over scores that stay in the cache."""
    q, v, k = q.transpose(0, 1), v.transpose(0, 1), k.permute(1, 2, 0)
    num_heads, length, _ = q.shape
    at_once = max(1, _SCORES_BYTES // (length * k.shape[2] * q.element_size()))
    if at_once >= num_heads:
        return _heads_in_cache(q, k, v, scale, mask).transpose(0, 1)
    out = q.new_empty(num_heads, length, v.shape[2])
    for first in range(0, num_heads, at_once):
        heads = slice(first, first + at_once)
        some_mask = None if mask is None else mask.expand(num_heads, -1, -1)[heads]
        out[heads] = _heads_in_cache(q[heads], k[heads], v[heads], scale, some_mask)
    return out.transpose(0, 1)


def _heads_in_cache(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """``(H, length, D)`` of queries and values, ``(H, D, length)`` of keys."""
    scores = q.new_empty(q.shape[0], q.shape[1], k.shape[2])
    added, factor = (scores, 0) if mask is None else (mask, 1)
    torch.baddbmm(added, q, k, beta=factor, alpha=scale, out=scores)
    torch.softmax(scores, dim=-1, out=scores)
    return torch.bmm(scores, v)


def _by_distance(relative_bias: Tensor, longest: int) -> Tensor:
    """``(H, 2 · longest - 1)``: the bias of each distance from ``1 - longest`` on."""
    reach = relative_bias.shape[1] // 2
    distances = torch.arange(1 - longest, longest, device=relative_bias.device)
    return relative_bias.index_select(1, distances.clamp_(-reach, reach).add_(reach))


def _reversed_bias(by_distance: Tensor, length: int) -> Tensor:
    """``(H, length, length)``, a view: the bias of every key for the last query, the last but one
    and so on."""
    num_heads, width = by_distance.shape
    longest = (width + 1) // 2
    return by_distance.as_strided((num_heads, length, length), (width, 1, 1), longest - length)


def _window_edges(q: Tensor, window: int) -> Tensor:
    """``(rows, rows + 2 · window)``: 0 where a block's query sees a key, else -inf. Column 0 is the
    first key that the block's first query sees."""
    rows = torch.arange(_WINDOW_BLOCK, device=q.device)
    columns = torch.arange(_WINDOW_BLOCK + 2 * window, device=q.device)
    before = columns - rows.unsqueeze(1)
    mask = q.new_zeros(before.shape)
    return mask.masked_fill_((before < 0) | (before > 2 * window), float("-inf"))


def _attend_in_window(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, edges: Tensor, out: Tensor
) -> None:
    """One sequence, ``(length, H, D)``, in blocks of queries."""
    length, num_heads, _ = q.shape
    for begin in range(0, length, _WINDOW_BLOCK):
        end = min(begin + _WINDOW_BLOCK, length)
        first, last = max(begin - window, 0), min(end + window, length)
        shift = begin - window
        mask = edges[: end - begin, first - shift : last - shift]
        queries, keys, values = q[begin:end], k[first:last], v[first:last]
        size = num_heads * mask.numel() * mask.element_size()
        if q.dtype in _WINDOW_GEMM and size <= _WINDOW_SCORES:
            out[begin:end] = _attend_in_cache(queries, keys, values, scale, mask)
        else:
            out[begin:end] = _sdpa(queries[None], keys[None], values[None], scale, mask)[0]
