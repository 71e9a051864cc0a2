"""The Triton backend: NVIDIA GPUs from Ampere on; GEMMs stay with cuBLAS.

Runs on CPU tensors too where Triton interprets its kernels (``TRITON_INTERPRET=1``), for tests.
"""

from __future__ import annotations

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
from encoder_fast.kernels import add_layer_norm as add_layer_norm_kernel
from encoder_fast.kernels import attention as attention_kernel
from encoder_fast.kernels import embed_layer_norm as embed_layer_norm_kernel

HEAD_SIZES: frozenset[int] | None = frozenset({16, 32, 64, 96, 128})
MAX_WIDTH: int | None = 8192
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float
) -> Tensor:
    return attention_kernel.attention(q, k, v, cu_seqlens, max_seqlen, softmax_scale)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
) -> Tensor:
    return add_layer_norm_kernel.add_layer_norm(x, residual, weight, bias, eps, x_bias=x_bias)


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
    return embed_layer_norm_kernel.embed_layer_norm(
        input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps
    )


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
