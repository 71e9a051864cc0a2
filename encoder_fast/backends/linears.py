"""What the backends share of a linear: its prepared form, stacking, the activations, and the plain
PyTorch that serves wherever a backend has nothing better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = str | Callable[[Tensor], Tensor]
"""One of ``ACTIVATIONS``, fused into the linear where a backend can; or the model's own
activation, called on the linear's output."""

_BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

ACTIVATIONS = tuple(_BY_NAME)
"""``gelu`` is the erf form."""


@dataclass(frozen=True, slots=True)
class PreparedLinear:
    """One or several linears with the same input, as one GEMM.

    Attributes:
        weight: ``(N, K)``, the output features of all of them stacked; opaque on the CPU backend.
        bias: ``(N,)`` or ``None``.
        dtype: what the GEMM computes in.
        fused: the backend may hand the weight to its fused linear.
    """

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    fused: bool = False


@dataclass(frozen=True, slots=True)
class FeedForwardSlice:
    """The linears of some of the inner features of a feed-forward block.

    Attributes:
        gate: of a gated block, where it is kept apart; else ``w_in`` gives the features and then
            their gates.
    """

    w_in: PreparedLinear
    w_out: PreparedLinear
    gate: PreparedLinear | None = None


@dataclass(frozen=True, slots=True)
class PreparedFeedForward:
    """``W_out · activation(W_in · x + b_in) + b_out`` as a sum over slices of the inner features.

    Attributes:
        slices: ``b_out`` is with the first.
        gated: the activated features are multiplied with their gates ahead of ``W_out``.
    """

    slices: tuple[FeedForwardSlice, ...]
    gated: bool = False


def stack_linears(
    weights: list[Tensor], biases: list[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Several linears over the same input as one: features stacked, a missing bias as zeros."""
    if len(weights) == 1:
        return weights[0].detach(), None if biases[0] is None else biases[0].detach()
    weight = torch.cat([w.detach() for w in weights])
    if all(b is None for b in biases):
        return weight, None
    parts = [
        w.new_zeros(w.shape[0]) if b is None else b.detach()
        for w, b in zip(weights, biases, strict=True)
    ]
    return weight, torch.cat(parts)


def activate(x: Tensor, activation: Activation | None) -> Tensor:
    """Apply a named activation, or the model's own."""
    if activation is None:
        return x
    return _BY_NAME[activation](x) if isinstance(activation, str) else activation(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return activate(F.linear(x, weight, bias), activation)


def prepare_linear(weights: list[Tensor], biases: list[Tensor | None]) -> PreparedLinear:
    weight, bias = stack_linears(weights, biases)
    return PreparedLinear(weight, bias, weight.dtype)


def linear_prepared(x: Tensor, prepared: PreparedLinear, activation: Activation | None) -> Tensor:
    return activate(F.linear(x, prepared.weight, prepared.bias), activation)


def activate_and_gate(x: Tensor, activation: Activation | None) -> Tensor:
    """``activation(features) * gate`` of the two halves of the columns."""
    features, gate = x.chunk(2, dim=-1)
    return activate(features, activation) * gate


def prepare_feed_forward(
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    elementwise: bool,
    gated: bool,
) -> PreparedFeedForward:
    whole = FeedForwardSlice(prepare_linear([w_in], [b_in]), prepare_linear([w_out], [b_out]))
    return PreparedFeedForward((whole,), gated)


def feed_forward_prepared(
    x: Tensor, prepared: PreparedFeedForward, activation: Activation | None
) -> Tensor:
    (whole,) = prepared.slices
    if prepared.gated:
        inner = activate_and_gate(linear_prepared(x, whole.w_in, None), activation)
    else:
        inner = linear_prepared(x, whole.w_in, activation)
    return linear_prepared(inner, whole.w_out, None)
