"""One vector for each packed sequence: its first token, the mean or the maximum of its tokens.

The three poolings of Sentence-BERT (Reimers & Gurevych 2019, https://arxiv.org/abs/1908.10084).
"""

from __future__ import annotations

import torch
from torch import Tensor

from encoder_fast.backends import resolve
from encoder_fast.ops._library import Operator, check_dtype, forbid_grad

MODES = ("cls", "mean", "max")


def pool(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", *, backend: str = "auto") -> Tensor:
    """Pool each packed sequence.

    Args:
        x: ``(total, N)``, float16, bfloat16 or float32 (float64 too on ``reference``).
        cu_seqlens: int32 ``(B + 1,)`` on the same device; sequence ``b`` is tokens
            ``cu_seqlens[b]:cu_seqlens[b + 1]``.
        mode: ``"cls"`` (the first token), ``"mean"`` or ``"max"``.
        backend: ``auto``, or a backend by name, which runs or raises.

    Returns:
        ``(B, N)`` in float32 (float64 for float64), summed in that precision; zeros for a sequence
        without a token.

    Raises:
        ValueError: shapes, dtypes or devices don't fit, or the mode is unknown.
        BackendUnavailableError: the backend can't run there.
    """
    if x.dim() != 2:
        raise ValueError(f"x must have shape (total, N), got {tuple(x.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            "cu_seqlens must be int32 of shape (B + 1,), got "
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, x on {x.device}")
    forbid_grad("pool", x)
    name, _ = resolve(backend, x.device)
    check_dtype("pool", name, x.dtype)
    return operator.dispatch(x, cu_seqlens, mode, name)


def _fake(x: Tensor, cu_seqlens: Tensor, *_: str) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1], dtype=dtype)


operator = Operator(
    "pool(Tensor x, Tensor cu_seqlens, str mode, str backend) -> Tensor",
    fake=_fake,
)
