"""What the backends share of a linear: its prepared form, stacking, and the activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = str | Callable[[Tensor], Tensor]
"""``"gelu"`` (erf), ``"gelu_tanh"`` or ``"relu"``, fused into the linear where a backend can; or
the model's own activation, called on the linear's output."""


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
class PreparedFeedForward:
    """``W_out · activation(W_in · x + b_in) + b_out`` as a sum over slices of the inner features.

    Attributes:
        slices: the two linears of each slice; ``b_out`` is with the first.
    """

    slices: tuple[tuple[PreparedLinear, PreparedLinear], ...]


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
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return F.relu(x)
    if callable(activation):
        return activation(x)
    raise ValueError(
        f"activation must be 'gelu', 'gelu_tanh', 'relu' or callable, got {activation!r}"
    )
