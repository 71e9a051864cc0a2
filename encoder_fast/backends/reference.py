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
    Activation,
    PreparedFeedForward,
    PreparedLinear,
    activate,
    stack_linears,
)

HEAD_SIZES: frozenset[int] | None = None
MAX_WIDTH: int | None = None
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float
) -> Tensor:
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    bounds = cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        scores = torch.einsum("qhd,khd->hqk", _wide(q[start:stop]), _wide(k[start:stop]))
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
    total = _wide(x)
    for term in (x_bias, residual):
        if term is not None:
            total = total + _wide(term)
    centred = total - total.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * _wide(weight)
    if bias is not None:
        normed = normed + _wide(bias)
    return normed.to(x.dtype)


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
    return add_layer_norm(total, None, weight, bias, eps, None).to(word.dtype)


def prepare_linear(weights: list[Tensor], biases: list[Tensor | None]) -> PreparedLinear:
    weight, bias = stack_linears(weights, biases)
    return PreparedLinear(weight, bias, weight.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return activate(F.linear(x, weight, bias), activation)


def linear_prepared(x: Tensor, prepared: PreparedLinear, activation: Activation | None) -> Tensor:
    return activate(F.linear(x, prepared.weight, prepared.bias), activation)


def prepare_feed_forward(
    w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None
) -> PreparedFeedForward:
    return PreparedFeedForward(
        ((prepare_linear([w_in], [b_in]), prepare_linear([w_out], [b_out])),)
    )


def feed_forward_prepared(
    x: Tensor, prepared: PreparedFeedForward, activation: Activation | None
) -> Tensor:
    ((w_in, w_out),) = prepared.slices
    return linear_prepared(linear_prepared(x, w_in, activation), w_out, None)
