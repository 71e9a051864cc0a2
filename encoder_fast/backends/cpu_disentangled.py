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
    out = torch.empty(q.shape, dtype=q.dtype)
    bounds = cu_seqlens.tolist()
    out[bounds[-1] :].zero_()
    longest = max((stop - start for start, stop in pairwise(bounds)), default=0)
    if longest == 0:
        return out
    if q.dtype == torch.float16:
        # Few processors multiply float16; float32 is faster there, and more exact.
        q, k, v = q.float(), k.float(), v.float()
    reach = row_of_distance.shape[0] // 2
    distance = torch.arange(1 - longest, longest).clamp_(-reach, reach)
    rows = row_of_distance[distance + reach]
    by_key_offset = None if pos_key is None else _by_distance(pos_key, rows.flip(0), q.dtype)
    by_query_offset = None if pos_query is None else _by_distance(pos_query, rows, q.dtype)
    for start, stop in pairwise(bounds):
        if start == stop:
            continue
        length = stop - start
        one_q, one_k, one_v = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        near = slice(longest - length, longest + length - 1)
        if by_key_offset is None:
            scores = torch.bmm(one_q, one_k.mT).mul_(softmax_scale)
        else:
            c2p = torch.bmm(one_q, by_key_offset[:, :, near])
            scores = torch.baddbmm(
                _sheared(c2p), one_q, one_k.mT, beta=softmax_scale, alpha=softmax_scale
            )
        if by_query_offset is not None:
            p2c = torch.bmm(one_k, by_query_offset[:, :, near])
            scores.add_(_sheared(p2c).mT, alpha=softmax_scale)
        torch.softmax(scores, dim=-1, out=scores)
        out[start:stop] = torch.bmm(scores, one_v).transpose(0, 1)
    return out


def _by_distance(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``(rows, H, D)`` to ``(H, D, distances)``."""
    return table.index_select(0, rows).to(dtype).permute(1, 2, 0)


def _sheared(products: Tensor) -> Tensor:
    """``[h, i, L - 1 - i + j]`` of ``(H, L, 2L - 1)`` as ``[h, i, j]``: a view."""
    heads, length, width = products.shape
    return products.as_strided((heads, length, length), (length * width, width - 1, 1), length - 1)
