"""A linear layer with its activation in the epilogue.

``activation(x Wᵀ + b)``. GELU is the erf form unless the tanh form is asked for by name
(Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415).
"""

from __future__ import annotations

from torch import Tensor

from encoder_fast.backends import load, resolve
from encoder_fast.backends.linears import (
    ACTIVATIONS,
    Activation,
    PreparedFeedForward,
    PreparedLinear,
)
from encoder_fast.ops._library import Operator, check_dtype, forbid_grad
from encoder_fast.ops.add_layer_norm import check_vector

__all__ = [
    "Activation",
    "PreparedFeedForward",
    "PreparedLinear",
    "linear",
    "operator",
    "prepare",
    "prepare_feed_forward",
    "run",
    "run_feed_forward",
]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply, add the bias, activate.

    Args:
        x: ``(M, K)``, float16, bfloat16 or float32.
        weight: ``(N, K)`` in x's dtype.
        bias: ``(N,)``, contiguous, or ``None``.
        activation: ``None``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"relu"``.
        backend: ``auto``, or a backend by name, which runs or raises.

    Returns:
        ``(M, N)`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices don't fit, an operand has no memory, or the activation
            is unknown.
        BackendUnavailableError: the backend can't run there.
    """
    name, _ = resolve(backend, x.device)
    return operator.dispatch(x, weight, bias, activation, name)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str
) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x (M, K) and weight (N, K) don't fit: {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    check_vector("bias", bias, weight.shape[0], x.device)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {ACTIVATIONS}, got {activation!r}")
    for name, term in (("weight", weight), ("bias", bias)):
        if term is not None and (term.dtype != x.dtype or term.device != x.device):
            raise ValueError(
                f"{name} is {term.dtype} on {term.device}, x is {x.dtype} on {x.device}"
            )
    forbid_grad("linear", x, weight, bias)
    check_dtype("linear", backend, x.dtype)


def prepare(weights: list[Tensor], biases: list[Tensor | None], backend: str) -> PreparedLinear:
    """Stack linears with one input into one GEMM, in the layout the backend wants.

    Copies where there are several of them or the backend reorders: what it returns does not follow
    later changes of the weights (see :mod:`encoder_fast.weights`).
    """
    return load(backend).prepare_linear(weights, biases)


def run(x: Tensor, prepared: PreparedLinear, activation: Activation | None, backend: str) -> Tensor:
    """What the engine calls, with prepared weights; nothing is checked."""
    return load(backend).linear_prepared(x, prepared, activation)


def prepare_feed_forward(
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: Activation,
    gated: bool,
    backend: str,
) -> PreparedFeedForward:
    """The two linears of a feed-forward block in the form the backend wants; see ``prepare``.

    Of a gated block ``w_in`` holds the rows of the features and then those of their gates. Only a
    named activation is known to work element by element, so that the block may be sliced.
    """
    elementwise = isinstance(activation, str)
    return load(backend).prepare_feed_forward(w_in, b_in, w_out, b_out, elementwise, gated)


def run_feed_forward(
    x: Tensor, prepared: PreparedFeedForward, activation: Activation | None, backend: str
) -> Tensor:
    """``W_out · activation(W_in · x + b_in) + b_out`` for the engine, or of a gated block
    ``W_out · (activation(features) * gate) + b_out``; nothing is checked."""
    return load(backend).feed_forward_prepared(x, prepared, activation)


operator = Operator(
    "linear(Tensor x, Tensor weight, Tensor? bias, str? activation, str backend) -> Tensor",
    _check,
    fake=lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
)
