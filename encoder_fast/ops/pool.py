"""One vector for each packed sequence: its first token, the mean or the maximum of its tokens.

The three poolings of Sentence-BERT (Reimers & Gurevych 2019, https://arxiv.org/abs/1908.10084).
"""

from __future__ import annotations

import torch
from torch import Tensor

from encoder_fast.backends import resolve
from encoder_fast.ops._library import Operator, check_cu_seqlens, check_dtype, forbid_grad

MODES = ("cls", "mean", "max")


def pool(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", *, backend: str = "auto") -> Tensor:
    """Pool each packed sequence.

    Args:
        x: ``(total, N)``, float16, bfloat16 or float32 (float64 too on ``reference``).
        cu_seqlens: int32 ``(B + 1,)``, contiguous, on the same device, from 0 on, not falling;
            sequence ``b`` is tokens ``cu_seqlens[b]:cu_seqlens[b + 1]``.
        mode: ``"cls"`` (the first token), ``"mean"`` or ``"max"``.
        backend: ``auto``, or a backend by name, which runs or raises.

    Returns:
        ``(B, N)`` in float32 (float64 for float64), summed in that precision; zeros for a sequence
        without a token.

    Raises:
        ValueError: shapes, dtypes or devices don't fit, an operand has no memory, or the mode is
            unknown; on a CPU also what ``cu_seqlens`` holds.
        BackendUnavailableError: the backend can't run there.
    """
    name, _ = resolve(backend, x.device)
    return operator.dispatch(x, cu_seqlens, mode, name)


def _check(x: Tensor, cu_seqlens: Tensor, mode: str, backend: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must have shape (total, N), got {tuple(x.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    check_cu_seqlens(cu_seqlens, x.device)
    forbid_grad("pool", x)
    check_dtype("pool", backend, x.dtype)


def _fake(x: Tensor, cu_seqlens: Tensor, *_: str) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1], dtype=dtype)


operator = Operator(
    "pool(Tensor x, Tensor cu_seqlens, str mode, str backend) -> Tensor",
    _check,
    fake=_fake,
)
