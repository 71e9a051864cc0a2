"""Each op on the backend that was measured, or is predicted, to be the fastest for its shape.

What ``auto`` uses where :mod:`~encoder_fast.backends.measurements` says anything. Linears are
``triton``'s, for their weights are prepared once, ahead of any shape. Rows of attention that begin
between two accesses of CUDA C++ are ``triton``'s too, whose launchers copy them.
"""

from __future__ import annotations

from torch import Tensor

from encoder_fast.backends import cuda_kernels, load, measurements
from encoder_fast.backends.cuda_kernels import UnalignedRowsError

_TRITON = load("triton")

HEAD_SIZES = _TRITON.HEAD_SIZES
MAX_WIDTH = _TRITON.MAX_WIDTH
DTYPES = _TRITON.DTYPES
RECORDABLE = _TRITON.RECORDABLE

count_tokens = _TRITON.count_tokens
feed_forward_prepared = _TRITON.feed_forward_prepared
linear = _TRITON.linear
linear_prepared = _TRITON.linear_prepared
place_tokens = _TRITON.place_tokens
pool = _TRITON.pool
prepare_feed_forward = _TRITON.prepare_feed_forward
prepare_linear = _TRITON.prepare_linear
rotary = _TRITON.rotary


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
    name = "triton"
    if window_size is None and relative_bias is None:
        shape = measurements.attention_class(q.shape[2], max_seqlen)
        name = measurements.winner("attention", q.device, q.dtype, shape)
    arguments = (q, k, v, cu_seqlens, max_seqlen, softmax_scale, window_size, relative_bias)
    try:
        return load(name).attention(*arguments)
    except UnalignedRowsError:
        return _TRITON.attention(*arguments)


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
    name, size = "triton", q.shape[2]
    sizes = cuda_kernels.HEAD_SIZES_OF_OP["disentangled_attention"]
    if q.dtype in cuda_kernels.DTYPES and size in sizes:
        shape = measurements.attention_class(size, max_seqlen)
        name = measurements.winner("disentangled_attention", q.device, q.dtype, shape)
    operands = (q, k, v, pos_key, pos_query, row_of_distance)
    try:
        return load(name).disentangled_attention(*operands, cu_seqlens, max_seqlen, softmax_scale)
    except UnalignedRowsError:
        return _TRITON.disentangled_attention(*operands, cu_seqlens, max_seqlen, softmax_scale)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
) -> Tensor:
    name = _norm("add_layer_norm", x)
    return load(name).add_layer_norm(x, residual, weight, bias, eps, x_bias)


def add_layer_norm_sum(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    name = _norm("add_layer_norm_sum", x)
    return load(name).add_layer_norm_sum(x, residual, weight, bias, eps, x_bias)


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
    name = _norm("embed_layer_norm", word)
    return load(name).embed_layer_norm(
        input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps
    )


def _norm(op: str, rows: Tensor) -> str:
    shape = measurements.norm_class(rows.shape[1])
    return measurements.winner(op, rows.device, rows.dtype, shape)
