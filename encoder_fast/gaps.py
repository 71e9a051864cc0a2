"""Attention by distance over masks with holes.

Packed, the tokens on both sides of a hole are neighbours, and what goes by the distance of columns
(a window, a bias, DeBERTa's positions) would take them to be nearer than they are. Such masks are
rare, so the kernels know nothing of them: where a batch has one, attention of this kind, and
nothing else, goes back to padded columns, where a distance is the same in every row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder_fast.packing import PackedBatch


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: PackedBatch,
    softmax_scale: float,
    window_size: int | None,
    relative_bias: Tensor | None,
) -> Tensor:
    """:func:`~encoder_fast.ops.attention.attention` by columns; ``(total, H, D)`` each."""
    columns = torch.arange(batch.padded_length, device=q.device)
    distance = columns - columns.unsqueeze(1)
    is_seen = _is_key(batch, q)
    bias = None
    if window_size is not None:
        is_seen = is_seen & (distance.abs() <= window_size)
    if relative_bias is not None:
        bias = relative_bias[:, _places(distance, relative_bias.shape[1])].to(q.dtype)
    queries, keys, values = (_by_head(batch, x) for x in (q, k, v))
    return _softmax(queries, keys, values, batch, softmax_scale, is_seen, bias)


def attend_disentangled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    row_of_distance: Tensor,
    batch: PackedBatch,
    softmax_scale: float,
) -> Tensor:
    """:func:`~encoder_fast.ops.disentangled_attention.disentangled_attention` by columns."""
    columns = torch.arange(batch.padded_length, device=q.device)
    distance = columns.unsqueeze(1) - columns
    rows = row_of_distance[_places(distance, row_of_distance.shape[0])].long()
    queries, keys, values = (_by_head(batch, x) for x in (q, k, v))
    shape = (*queries.shape[:2], *rows.shape)
    bias = queries.new_zeros(shape)
    if pos_key is not None:
        bias += (queries @ pos_key.permute(1, 2, 0)).gather(3, rows.expand(shape))
    if pos_query is not None:
        bias += (keys @ pos_query.permute(1, 2, 0)).gather(3, rows.mT.expand(shape)).mT
    bias *= softmax_scale
    return _softmax(queries, keys, values, batch, softmax_scale, _is_key(batch, q), bias)


def _places(distance: Tensor, width: int) -> Tensor:
    """The place of each distance in a table of ``width`` of them, distance 0 in its middle."""
    reach = width // 2
    return distance.clamp(-reach, reach) + reach


def _by_head(batch: PackedBatch, x: Tensor) -> Tensor:
    """``(total, H, D)`` to ``(B, H, S, D)``."""
    return batch.unpack(x).transpose(1, 2)


def _is_key(batch: PackedBatch, like: Tensor) -> Tensor:
    """``(B, 1, 1, S)``: where the tokens are."""
    return batch.unpack(like.new_ones(like.shape[0], dtype=torch.bool))[:, None, None]


def _softmax(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: PackedBatch,
    scale: float,
    is_seen: Tensor,
    bias: Tensor | None,
) -> Tensor:
    # A query that sees nothing is padding, and what it gets is not packed.
    mask = is_seen if bias is None else bias.masked_fill(~is_seen, float("-inf"))
    context = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return batch.pack(context.transpose(1, 2))
