"""The Triton backend: NVIDIA GPUs from Ampere on; GEMMs stay with cuBLAS.

Runs on CPU tensors too where Triton interprets its kernels (``TRITON_INTERPRET=1``), for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from encoder_fast.backends import linears
from encoder_fast.backends.linears import (
    Activation,
    PreparedFeedForward,
    linear,
    linear_prepared,
    prepare_feed_forward,
    prepare_linear,
)
from encoder_fast.backends.pooling import pool
from encoder_fast.kernels import add_layer_norm as add_layer_norm_kernel
from encoder_fast.kernels import attention as attention_kernel
from encoder_fast.kernels import disentangled_attention as disentangled_attention_kernel
from encoder_fast.kernels import embed_layer_norm as embed_layer_norm_kernel
from encoder_fast.kernels import gated as gated_kernel
from encoder_fast.kernels import local_attention as local_attention_kernel
from encoder_fast.kernels import rotary as rotary_kernel
from encoder_fast.kernels.pack_mask import count_tokens, place_tokens

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

# A tuple: torch.compile can't guard what a set has.
HEAD_SIZES: tuple[int, ...] | None = (16, 32, 64, 96, 128)
MAX_WIDTH: int | None = 8192
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# No op waits for the device or asks it anything, so that CUDA graphs can be recorded.
RECORDABLE = True


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
    # Where every sequence lies within the window, there is none.
    if window_size is not None and window_size + 1 < max_seqlen:
        return local_attention_kernel.local_attention(
            q, k, v, cu_seqlens, max_seqlen, softmax_scale, window_size
        )
    return attention_kernel.attention(q, k, v, cu_seqlens, max_seqlen, softmax_scale, relative_bias)


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
    return disentangled_attention_kernel.disentangled_attention(
        q, k, v, pos_key, pos_query, row_of_distance, cu_seqlens, max_seqlen, softmax_scale
    )


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
) -> Tensor:
    return add_layer_norm_kernel.add_layer_norm(x, residual, weight, bias, eps, x_bias=x_bias)


def add_layer_norm_sum(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = add_layer_norm_kernel.add_layer_norm(
        x, residual, weight, bias, eps, x_bias=x_bias, sum_out=total
    )
    return normed, total


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


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    rotary_kernel.rotary(qkv, cos, sin)


def feed_forward_prepared(
    x: Tensor, prepared: PreparedFeedForward, activation: Activation | None
) -> Tensor:
    if not prepared.gated or activation not in gated_kernel.ACTIVATIONS:
        return linears.feed_forward_prepared(x, prepared, activation)
    ((w_in, w_out),) = prepared.slices
    inner = gated_kernel.gated(linear_prepared(x, w_in, None), activation)
    return linear_prepared(inner, w_out, None)
