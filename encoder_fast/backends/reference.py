"""Plain PyTorch, on any device and in any dtype: the oracle of every test.

Written for reading, not for speed. In float16 and bfloat16 it computes in float32 and rounds once;
given float64 tensors it is the float64 reference of the parity rule.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder_fast.backends.linears import (
    feed_forward_prepared,
    linear,
    linear_prepared,
    prepare_feed_forward,
    prepare_linear,
)
from encoder_fast.backends.masks import count_tokens, place_tokens
from encoder_fast.backends.memory import checked_bounds

__all__ = [
    "add_layer_norm",
    "add_layer_norm_sum",
    "attention",
    "count_tokens",
    "disentangled_attention",
    "embed_layer_norm",
    "feed_forward_prepared",
    "linear",
    "linear_prepared",
    "place_tokens",
    "pool",
    "prepare_feed_forward",
    "prepare_linear",
    "rotary",
]

HEAD_SIZES: tuple[int, ...] | None = None
MAX_WIDTH: int | None = None
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


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
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for start, stop in pairwise(checked_bounds(cu_seqlens, q.shape[0], max_seqlen)):
        scores = torch.einsum("qhd,khd->hqk", _wide(q[start:stop]), _wide(k[start:stop]))
        scores *= softmax_scale
        index = torch.arange(stop - start, device=q.device)
        distance = index - index.unsqueeze(1)
        if relative_bias is not None:
            reach = relative_bias.shape[1] // 2
            scores += _wide(relative_bias)[:, distance.clamp(-reach, reach) + reach]
        if window_size is not None:
            scores.masked_fill_(distance.abs() > window_size, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        context = torch.einsum("hqk,khd->qhd", weights, _wide(v[start:stop]))
        out[start:stop] = context.to(q.dtype)
    return out


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
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    reach = row_of_distance.shape[0] // 2
    for start, stop in pairwise(checked_bounds(cu_seqlens, q.shape[0], max_seqlen)):
        places = torch.arange(stop - start, device=q.device)
        distance = places[:, None] - places[None, :]
        rows = row_of_distance[distance.clamp(-reach, reach) + reach].long()
        queries, keys = _wide(q[start:stop]), _wide(k[start:stop])
        scores = torch.einsum("qhd,khd->hqk", queries, keys)
        if pos_key is not None:
            scores += torch.einsum("qhd,qkhd->hqk", queries, _wide(pos_key)[rows])
        if pos_query is not None:
            scores += torch.einsum("khd,qkhd->hqk", keys, _wide(pos_query)[rows])
        weights = torch.softmax(scores * softmax_scale, dim=-1)
        context = torch.einsum("hqk,khd->qhd", weights, _wide(v[start:stop]))
        out[start:stop] = context.to(q.dtype)
    return out


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
) -> Tensor:
    return _layer_norm(_sum(x, x_bias, residual), weight, bias, eps).to(x.dtype)


def add_layer_norm_sum(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total = _sum(x, x_bias, residual)
    return _layer_norm(total, weight, bias, eps).to(x.dtype), total.to(x.dtype)


def _sum(*terms: Tensor | None) -> Tensor:
    wide = [_wide(term) for term in terms if term is not None]
    return torch.stack(torch.broadcast_tensors(*wide)).sum(dim=0)


def _layer_norm(total: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    centred = total - total.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * _wide(weight)
    if bias is not None:
        normed = normed + _wide(bias)
    return normed


def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    total = _wide(F.embedding(input_ids, word))
    for ids, table in ((token_type_ids, token_type), (position_ids, position)):
        if ids is not None and table is not None:
            total = total + _wide(F.embedding(ids, table))
    return _layer_norm(total, weight, bias, eps).to(word.dtype)


def pool(x: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    wide = _wide(x)
    out = wide.new_zeros(cu_seqlens.shape[0] - 1, x.shape[1])
    for row, (start, stop) in enumerate(pairwise(checked_bounds(cu_seqlens, x.shape[0]))):
        tokens = wide[start:stop]
        if start == stop:
            continue
        if mode == "cls":
            out[row] = tokens[0]
        elif mode == "mean":
            out[row] = tokens.mean(dim=0)
        else:
            out[row] = tokens.amax(dim=0)
    return out


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    first, second = _wide(qkv[:, :2]).chunk(2, dim=-1)
    cos, sin = (table[:, None, None].to(first.dtype) for table in (cos, sin))
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    qkv[:, :2] = turned.to(qkv.dtype)
