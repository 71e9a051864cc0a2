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


Linear = Callable[[Tensor, PreparedLinear, Activation | None], Tensor]


@dataclass(frozen=True, slots=True)
class PreparedFeedForward:
    """``W_out · activation(W_in · x + b_in) + b_out`` as a sum over slices of the inner features.

    Attributes:
        slices: the two linears of each slice; ``b_out`` is with the first.
        gated: the first linear gives the slice's features and then a gate for each, which the
            activated features are multiplied with.
    """

    slices: tuple[tuple[PreparedLinear, PreparedLinear], ...]
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


def inner_features(
    x: Tensor, w_in: PreparedLinear, activation: Activation | None, gated: bool, run: Linear
) -> Tensor:
    """What goes into the second linear of a feed-forward block; ``run`` computes the first."""
    if not gated:
        return run(x, w_in, activation)
    features, gate = run(x, w_in, None).chunk(2, dim=-1)
    return activate(features, activation) * gate


def prepare_feed_forward(
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    elementwise: bool,
    gated: bool,
) -> PreparedFeedForward:
    both = prepare_linear([w_in], [b_in]), prepare_linear([w_out], [b_out])
    return PreparedFeedForward((both,), gated)


def feed_forward_prepared(
    x: Tensor, prepared: PreparedFeedForward, activation: Activation | None
) -> Tensor:
    ((w_in, w_out),) = prepared.slices
    inner = inner_features(x, w_in, activation, prepared.gated, linear_prepared)
    return linear_prepared(inner, w_out, None)
