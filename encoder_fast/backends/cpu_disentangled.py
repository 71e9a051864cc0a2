"""Disentangled attention on the CPU: whole GEMMs over scores that stay in the cache.

A sequence of L tokens has 2L - 1 distances. With the position tables laid out by distance, one
GEMM gives every token's product with all of them, and the scores that belong to query i and key j
lie in it along a slanted line: seen with a row stride one shorter they are an ordinary L by L
matrix. So nothing is gathered element by element, which is what the original spends its time on.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from encoder_fast.backends.memory import checked_bounds

# As many heads go at a time as have their products and scores within this many bytes. All 12 heads
# of one sequence of 512 tokens in float32 have 63 MB, which is what any cache would lose.
_CACHE_BYTES = 8 << 20


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    row_of_distance: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
) -> Tensor:
    out = q.new_empty(q.shape)
    bounds = checked_bounds(cu_seqlens, q.shape[0], max_seqlen)
    out[bounds[-1] :].zero_()
    longest = max((stop - start for start, stop in pairwise(bounds)), default=0)
    if longest == 0:
        return out
    if q.dtype == torch.float16:
        # Few processors multiply float16; float32 is faster there, and more exact.
        q, k, v = q.float(), k.float(), v.float()
    reach = row_of_distance.shape[0] // 2
    distance = torch.arange(1 - longest, longest, device=q.device).clamp_(-reach, reach)
    rows = row_of_distance[distance + reach]
    by_key_offset = None if pos_key is None else _by_distance(pos_key, rows.flip(0), q.dtype)
    by_query_offset = None if pos_query is None else _by_distance(pos_query, rows, q.dtype)
    for start, stop in pairwise(bounds):
        if start == stop:
            continue
        length = stop - start
        near = slice(longest - length, longest + length - 1)
        by_key, by_query = (
            None if table is None else table[:, :, near]
            for table in (by_key_offset, by_query_offset)
        )
        one_q, one_k, one_v = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        one_out = out[start:stop].transpose(0, 1)
        num_heads = max(2, _CACHE_BYTES // (5 * length * length * q.element_size()))
        for first in range(0, q.shape[1], num_heads):
            heads = slice(first, first + num_heads)
            one_out[heads] = _attend(
                one_q[heads],
                one_k[heads],
                one_v[heads],
                None if by_key is None else by_key[heads],
                None if by_query is None else by_query[heads],
                softmax_scale,
            )
    return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, by_key: Tensor | None, by_query: Tensor | None, scale: float
) -> Tensor:
    """One sequence, ``(H, L, D)``, with tables ``(H, D, 2L - 1)`` by the key's and by the query's
    offset."""
    if by_key is None:
        scores = torch.bmm(q, k.mT).mul_(scale)
    else:
        c2p = _sheared(torch.bmm(q, by_key))
        scores = torch.baddbmm(c2p, q, k.mT, beta=scale, alpha=scale)
    if by_query is not None:
        scores.add_(_sheared(torch.bmm(k, by_query)).mT, alpha=scale)
    torch.softmax(scores, dim=-1, out=scores)
    return torch.bmm(scores, v)


def _by_distance(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``(rows, H, D)`` to ``(H, D, distances)``."""
    return table.index_select(0, rows).to(dtype).permute(1, 2, 0)


def _sheared(products: Tensor) -> Tensor:
    """``[h, i, L - 1 - i + j]`` of ``(H, L, 2L - 1)`` as ``[h, i, j]``: a view."""
    heads, length, width = products.shape
    return products.as_strided((heads, length, length), (length * width, width - 1, 1), length - 1)
