"""Residual addition and LayerNorm in one pass.

``LayerNorm(x + x_bias + residual)`` (Ba et al. 2016, https://arxiv.org/abs/1607.06450), and for
encoders that normalise ahead of each step, the sum beside it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from encoder_fast.backends import load, resolve
from encoder_fast.ops._library import Operator, check_dtype, forbid_grad


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-12,
    *,
    x_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add, then normalise each row.

    Args:
        x: ``(M, N)``, float16, bfloat16 or float32, last stride 1. ``N`` is 8192 at most on a GPU.
        residual: ``(M, N)`` in x's dtype, or ``None``.
        weight, bias, x_bias: ``(N,)``, contiguous, or ``None``.
        eps: added to the variance.
        backend: ``auto``, or a backend by name, which runs or raises.

    Returns:
        ``(M, N)``, contiguous, in x's dtype. Statistics are float32, the variance in a second pass.

    Raises:
        ValueError: shapes, strides, dtypes or devices don't fit, or an operand has no memory.
        BackendUnavailableError: the backend can't run there.
    """
    name, _ = resolve(backend, x.device)
    return operator.dispatch(x, residual, weight, bias, eps, x_bias, name)


def add_layer_norm_sum(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-12,
    *,
    x_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add, then normalise each row, and give back both: ``(normalised, sum)``.

    Arguments and errors are those of :func:`add_layer_norm`. The sum is rounded to x's dtype once;
    what is normalised is the sum before that.
    """
    name, _ = resolve(backend, x.device)
    return sum_operator.dispatch(x, residual, weight, bias, eps, x_bias, name)


def _check(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
    backend: str,
) -> None:
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x must have shape (M, N) with N > 0, got {tuple(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {tuple(x.shape)} {x.dtype}, got "
            f"{tuple(residual.shape)} {residual.dtype}"
        )
    for name, term in (("x", x), ("residual", residual)):
        if term is not None and term.numel() and term.stride(1) != 1:
            raise ValueError(f"{name}'s last stride must be 1, got strides {term.stride()}")
    for name, vector in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        check_vector(name, vector, x.shape[1], x.device)
    if residual is not None and residual.device != x.device:
        raise ValueError(f"residual is on {residual.device}, x on {x.device}")
    forbid_grad(op, x, residual, weight, bias, x_bias)
    check_dtype(op, backend, x.dtype)
    check_width(backend, x.shape[1])


def check_vector(name: str, vector: Tensor | None, size: int, device: torch.device) -> None:
    """Raise ``ValueError`` unless ``vector`` is a contiguous ``(size,)`` on ``device``."""
    if vector is None:
        return
    if vector.shape != (size,) or not vector.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous of shape ({size},), got {tuple(vector.shape)} "
            f"with strides {vector.stride()}"
        )
    if vector.device != device:
        raise ValueError(f"{name} is on {vector.device}, the rows on {device}")


def check_width(backend: str, width: int) -> None:
    """Raise ``ValueError`` where a backend's LayerNorm does not run rows of ``width``."""
    limit = load(backend).MAX_WIDTH
    if limit is not None and width > limit:
        raise ValueError(f"backend {backend!r} runs rows up to {limit} wide, got {width}")


operator = Operator(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? x_bias, str backend) -> Tensor",
    partial(_check, "add_layer_norm"),
    fake=lambda x, *_: x.new_empty(x.shape),
)

sum_operator = Operator(
    "add_layer_norm_sum(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? x_bias, str backend) -> (Tensor, Tensor)",
    partial(_check, "add_layer_norm_sum"),
    fake=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
