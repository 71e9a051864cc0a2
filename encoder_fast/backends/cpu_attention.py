"""Attention on the CPU: by a kernel of the project's own, or where there is none
(:mod:`encoder_fast.backends.cpu_kernels` says where), by PyTorch's SDPA and whole GEMMs.

By PyTorch it goes sequence by sequence, runs of neighbours of equal length together; nothing is
padded. What is added to the scores, a bias by distance or the edges of a window, never takes a
tensor as large as the scores:

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

from encoder_fast.backends import cpu_kernels
from encoder_fast.backends.memory import checked_bounds
from encoder_fast.backends.onednn import has_onednn

# At these lengths one sequence goes through whole GEMMs, as many heads at a time as have their
# scores within this many bytes. It took 0.5 to 0.9 times as long as PyTorch's flash kernel, which
# multiplies in blocks of 32 or 64 queries.
_CACHED_SCORES = {torch.float32: range(1, 449), torch.bfloat16: range(64, 2049)}
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
    if cpu_kernels.attends(q, k, v, cu_seqlens, relative_bias):
        return cpu_kernels.attention(
            q, k, v, cu_seqlens, max_seqlen, softmax_scale, window_size, relative_bias
        )
    total, num_heads, head_size = q.shape
    out = q.new_empty(total, num_heads, head_size)
    bounds = checked_bounds(cu_seqlens, total, max_seqlen)
    lengths = [stop - start for start, stop in pairwise(bounds)]
    batch_size, longest = len(lengths), max(lengths, default=0)
    window = edges = by_distance = None
    if window_size is not None and longest > window_size + 1:
        window, edges = window_size, _window_edges(q, window_size)
    if relative_bias is not None and longest:
        by_distance = cpu_kernels.by_distance(relative_bias, longest)
    same_dtype = relative_bias is None or relative_bias.dtype == q.dtype
    scores = q.new_empty(_most_scores(q, lengths, window))
    sequences = _heads_first(q, k, v, out, lengths) if scores.numel() else []
    first = 0
    while first < batch_size:
        length = lengths[first]
        last = first + 1
        while last < batch_size and lengths[last] == length:
            last += 1
        alone = last - first == 1 or length >= _TOGETHER_BELOW
        bias = None if by_distance is None else _reversed_bias(by_distance, length)
        if window is not None and edges is not None and length > window + 1:
            for sequence in sequences[first:last]:
                _attend_in_window(*sequence, softmax_scale, window, edges, scores)
        elif alone and same_dtype and _goes_by_gemms(q.dtype, length):
            for queries, keys, values, context in sequences[first:last]:
                if bias is None:
                    context.copy_(_by_gemms(queries, keys, values, softmax_scale, None, scores))
                else:
                    flipped = queries.flip(1)
                    flipped = _by_gemms(flipped, keys, values, softmax_scale, bias, scores)
                    context.copy_(flipped.flip(1))
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


def _heads_first(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lengths: list[int]
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Views of each sequence: ``(H, length, D)``, of the keys ``(H, D, length)``.

    A view at a time, and memory of its own for each sequence's scores, made a whole model take 7%
    longer over texts of up to 40 tokens.
    """
    used = sum(lengths)
    queries, values, contexts = (
        x[:used].transpose(0, 1).split(lengths, dim=1) for x in (q, v, out)
    )
    keys = k[:used].permute(1, 2, 0).split(lengths, dim=2)
    return list(zip(queries, keys, values, contexts, strict=True))


def _most_scores(q: Tensor, lengths: list[int], window: int | None) -> int:
    """The most scores of ``q``'s dtype that are held at a time."""
    num_heads, size = q.shape[1], q.element_size()
    within_window = 0
    if window is not None:
        within_window = _WINDOW_SCORES // size
        lengths = [length for length in lengths if length <= window + 1]
    longest = max((n for n in lengths if _goes_by_gemms(q.dtype, n)), default=0)
    whole = min(num_heads * longest**2, max(longest**2, _SCORES_BYTES // size))
    return max(whole, within_window)


def _by_gemms(
    q: Tensor, k: Tensor, v: Tensor, scale: float, added: Tensor | None, scores: Tensor
) -> Tensor:
    """``softmax(q k · scale + added) v`` by whole GEMMs, of as many heads at a time as ``scores``,
    which is overwritten, has room for.

    Args:
        q: ``(H, rows, D)``.
        k: ``(H, D, columns)``.
        v: ``(H, columns, D)``.
        added: ``(H or 1, rows, columns)`` or ``(rows, columns)``.

    Returns:
        ``(H, rows, D)``.
    """
    num_heads, rows, _ = q.shape
    columns = k.shape[2]
    at_once = scores.numel() // (rows * columns)
    if at_once >= num_heads:
        shape, strides = (num_heads, rows, columns), (rows * columns, columns, 1)
        block = scores.as_strided(shape, strides)
        start, factor = (block, 0) if added is None else (added, 1)
        torch.baddbmm(start, q, k, beta=factor, alpha=scale, out=block)
        torch.softmax(block, dim=-1, out=block)
        return torch.bmm(block, v)
    if added is not None:
        added = added.expand(num_heads, -1, -1)
    parts = []
    for first in range(0, num_heads, at_once):
        heads = slice(first, first + at_once)
        some = None if added is None else added[heads]
        parts.append(_by_gemms(q[heads], k[heads], v[heads], scale, some, scores))
    return torch.cat(parts)


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    scale: float,
    window: int,
    edges: Tensor,
    scores: Tensor,
) -> None:
    """One sequence, heads first, in blocks of queries."""
    num_heads, length, _ = q.shape
    for begin in range(0, length, _WINDOW_BLOCK):
        end = min(begin + _WINDOW_BLOCK, length)
        first, last = max(begin - window, 0), min(end + window, length)
        shift = begin - window
        mask = edges[: end - begin, first - shift : last - shift]
        queries, keys, values = q[:, begin:end], k[:, :, first:last], v[:, first:last]
        if q.dtype in _WINDOW_GEMM and num_heads * mask.numel() <= scores.numel():
            context = _by_gemms(queries, keys, values, scale, mask, scores)
        else:
            context = F.scaled_dot_product_attention(
                queries[None], keys.mT[None], values[None], attn_mask=mask, scale=scale
            )[0]
        out[:, begin:end] = context
