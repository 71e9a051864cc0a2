"""The CPU backend: PyTorch's oneDNN GEMMs and the project's own kernels over packed tokens.

Most of the time goes to the GEMMs (88% of a MiniLM forward in float32, 84% in bfloat16): weights in
oneDNN's blocked layout, bias and activation in the GEMM's epilogue. The rest is attention and
LayerNorm, by the kernels of ``csrc/cpu/`` or by PyTorch; nothing is padded and no mask is built.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder_fast.backends import cpu_kernels, masks
from encoder_fast.backends.cpu_attention import attention
from encoder_fast.backends.cpu_disentangled import disentangled_attention
from encoder_fast.backends.heap import keep_large_blocks
from encoder_fast.backends.heap import map_large_blocks as first_of_a_size
from encoder_fast.backends.linears import (
    Activation,
    PreparedFeedForward,
    PreparedLinear,
    activate,
    inner_features,
    stack_linears,
)
from encoder_fast.backends.masks import place_tokens
from encoder_fast.backends.memory import checked_bounds
from encoder_fast.backends.onednn import has_onednn

__all__ = [
    "add_layer_norm",
    "add_layer_norm_sum",
    "attention",
    "count_tokens",
    "disentangled_attention",
    "embed_layer_norm",
    "feed_forward_prepared",
    "first_of_a_size",
    "linear",
    "linear_prepared",
    "place_tokens",
    "pool",
    "prepare_feed_forward",
    "prepare_linear",
    "rotary",
    "rows_to_compute",
]

HEAD_SIZES: tuple[int, ...] | None = None
MAX_WIDTH: int | None = None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# oneDNN's names: (attribute, algorithm). "none" is the erf form of its GELU.
# Its ReLU is left out: it turns NaN into 0, which hides what the original would show.
_EPILOGUES = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}

# oneDNN sums the products of a float32 dot in blocks of 512 and more, PyTorch's own GEMM in blocks
# of 192: over 3072 of them the error is 2.2 times as large, and the feed-forward's output, the
# longest dot of a layer, makes most of a model's error. In slices of at most 768 (and no less than
# two) it is 1.5 times as large, and the feed-forward took 4% less to 6% more time.
_SLICE, _SLICE_FROM = 768, 512

# In half precision queries and keys are turned in float32, as many tokens at a time as leave the
# wider copy in the cache.
_ROTARY_TOKENS = 64


def rows_to_compute(rows: int) -> int:
    """The next of the sizes that GEMMs are run in, 16 from a power of two to the next and 64 apart
    at most: 2% more rows on average, and from 2,048 on less than that.

    oneDNN makes a primitive for every size that comes: 0.4 ms and 0.55 MB each, five of them in a
    model of the BERT family, and they are kept up to 1,024. Texts of 1 to 300 tokens, one by one,
    had MiniLM grow by 700 MB, and found none of them again.
    """
    step = 1 << min(6, max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


def count_tokens(
    mask: Tensor, input_ids: Tensor | None, vocab_size: int, onlookers: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`encoder_fast.backends.masks.count_tokens`."""
    if input_ids is None and bool((mask == 1).all()):
        # Every single text comes with such a mask, and there a tenth of the operations counts.
        rows, columns = mask.shape
        facts = torch.tensor([rows * columns, columns, 0, 0, 0, 0], device=mask.device)
        headless = torch.zeros(rows, dtype=torch.bool, device=mask.device)
        return facts, torch.full((rows,), columns, device=mask.device), headless
    return masks.count_tokens(mask, input_ids, vocab_size, onlookers)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
) -> Tensor:
    if cpu_kernels.normalises(x, residual, weight, bias, x_bias):
        return cpu_kernels.add_layer_norm(x, residual, weight, bias, eps, x_bias)
    for term in (x_bias, residual):
        if term is not None:
            x = x + term
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm_sum(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if cpu_kernels.normalises(x, residual, weight, bias, x_bias):
        total = torch.empty_like(x)
        return cpu_kernels.add_layer_norm(x, residual, weight, bias, eps, x_bias, total), total
    total = (x if x_bias is None else x + x_bias) + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


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
    x, residual = F.embedding(input_ids, word), None
    for ids, table in ((token_type_ids, token_type), (position_ids, position)):
        if ids is not None and table is not None:
            x, residual = (x if residual is None else x + residual), F.embedding(ids, table)
    return add_layer_norm(x, residual, weight, bias, eps, None)


def prepare_linear(weights: list[Tensor], biases: list[Tensor | None]) -> PreparedLinear:
    keep_large_blocks()
    weight, bias = stack_linears(weights, biases)
    return _reorder(weight, bias)


def _reorder(weight: Tensor, bias: Tensor | None) -> PreparedLinear:
    dtype = weight.dtype
    if dtype == torch.float16 and not has_onednn(dtype):
        # Few processors multiply float16: there PyTorch's own GEMM is many times slower than
        # oneDNN's in float32, which is also the more exact of the two.
        dtype = torch.float32
        bias = None if bias is None else bias.float()
    if not has_onednn(dtype):
        return PreparedLinear(weight, bias, weight.dtype)
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous())
    return PreparedLinear(reordered, bias, dtype, fused=True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    prepared = PreparedLinear(weight, bias, weight.dtype, fused=has_onednn(weight.dtype))
    return linear_prepared(x, prepared, activation)


def linear_prepared(x: Tensor, prepared: PreparedLinear, activation: Activation | None) -> Tensor:
    if not prepared.fused:
        return activate(F.linear(x, prepared.weight, prepared.bias), activation)
    attribute, algorithm = "none", ""
    if isinstance(activation, str) and activation in _EPILOGUES:
        attribute, algorithm = _EPILOGUES[activation]
        activation = None
    dtype = x.dtype
    if dtype != prepared.dtype:
        x = x.to(prepared.dtype)
    y = torch.ops.mkldnn._linear_pointwise(
        x, prepared.weight, prepared.bias, attribute, [], algorithm
    )
    return activate(y if dtype == prepared.dtype else y.to(dtype), activation)


def prepare_feed_forward(
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    elementwise: bool,
    gated: bool,
) -> PreparedFeedForward:
    inner = w_out.shape[1]
    size = inner
    exact_sum_wanted = w_in.dtype == torch.float32 and has_onednn(torch.float32)
    if elementwise and exact_sum_wanted and inner >= _SLICE_FROM:
        count = max(2, -(-inner // _SLICE))
        size = -(-inner // count)
    # of a gated block, the rows of a slice's features and those of their gates
    offsets = (0, inner) if gated else (0,)
    slices = []
    for start in range(0, inner, size):
        stop = min(start + size, inner)
        rows = [slice(offset + start, offset + stop) for offset in offsets]
        slices.append(
            (
                prepare_linear(
                    [w_in[part] for part in rows],
                    [None if b_in is None else b_in[part] for part in rows],
                ),
                prepare_linear([w_out[:, start:stop]], [None if start else b_out]),
            )
        )
    return PreparedFeedForward(tuple(slices), gated)


def feed_forward_prepared(
    x: Tensor, prepared: PreparedFeedForward, activation: Activation | None
) -> Tensor:
    y: Tensor | None = None
    for w_in, w_out in prepared.slices:
        inner = inner_features(x, w_in, activation, prepared.gated, linear_prepared)
        if y is None:
            y = linear_prepared(inner, w_out, None)
        else:
            y = torch.ops.mkldnn._linear_pointwise.binary(inner, y, w_out.weight, None, "add")
        # The next slice is to get the same memory, which is in the cache.
        del inner
    assert y is not None
    return y


def pool(x: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    bounds = checked_bounds(cu_seqlens, x.shape[0])
    out = x.new_zeros(len(bounds) - 1, x.shape[1], dtype=torch.float32)
    for row, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        # A reduction over the rows of one sequence is 5 times as fast as one over a view of many.
        if mode == "cls":
            out[row] = x[start]
        elif mode == "mean":
            torch.mean(x[start:stop], dim=0, dtype=torch.float32, out=out[row])
        else:
            out[row] = x[start:stop].amax(dim=0)
    return out


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    qk = qkv[:, :2]
    cos, sin = cos[:, None, None], sin[:, None, None]
    if qkv.dtype == torch.float32:
        _turn(qk, cos, sin)
        return
    for part in zip(*(x.split(_ROTARY_TOKENS) for x in (qk, cos, sin)), strict=True):
        wide = part[0].float()
        _turn(wide, part[1], part[2])
        part[0].copy_(wide)


def _turn(qk: Tensor, cos: Tensor, sin: Tensor) -> None:
    first, second = qk.chunk(2, dim=-1)
    crossed = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(crossed)
