"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), in place.

Feature ``i`` of a head and feature ``i + D / 2`` are a point in the plane, turned by the angle
``position · inverse_frequency[i]``. Queries and keys turned so give a score that depends on the
distance of their positions alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from encoder_fast.backends import resolve
from encoder_fast.ops._library import Operator, check_dtype, forbid_grad
from encoder_fast.ops.attention import why_no_head_size


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    """Turn the queries and keys of a projection, in place.

    Args:
        qkv: ``(total, 3, H, D)``, contiguous, float16, bfloat16 or float32 (float64 too on
            ``reference``), ``D`` even. ``qkv[:, 0]`` and ``qkv[:, 1]`` are overwritten.
        cos, sin: float32 ``(total, D / 2)``, contiguous: of each token's angles, as from
            :func:`rotary_tables`.
        backend: ``auto``, or a backend by name, which runs or raises.

    Returns:
        ``qkv`` itself.

    Raises:
        ValueError: shapes, strides, dtypes or devices don't fit, or an operand has no memory.
        BackendUnavailableError: the backend can't run there.
    """
    name, _ = resolve(backend, qkv.device)
    operator.dispatch(qkv, cos, sin, name)
    return qkv


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, backend: str) -> None:
    if qkv.dim() != 4 or qkv.shape[1] != 3 or qkv.shape[3] % 2 or not qkv.is_contiguous():
        raise ValueError(
            "qkv must be contiguous of shape (total, 3, H, D) with even D, got "
            f"{tuple(qkv.shape)} with strides {qkv.stride()}"
        )
    half = (qkv.shape[0], qkv.shape[3] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != half or table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous torch.float32 of shape {half}, got {table.dtype} of "
                f"shape {tuple(table.shape)} with strides {table.stride()}"
            )
        if table.device != qkv.device:
            raise ValueError(f"{name} is on {table.device}, qkv on {qkv.device}")
    forbid_grad("rotary", qkv, cos, sin)
    check_dtype("rotary", backend, qkv.dtype)
    reason = why_no_head_size(backend, qkv.shape[3])
    if reason is not None:
        raise ValueError(reason)


def rotary_tables(position_ids: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines and sines of all angles, float32 ``(total, D / 2)`` each.

    Args:
        position_ids: integers ``(total,)``.
        inverse_frequencies: ``(D / 2,)``. The angles are float32, as transformers computes them.
    """
    frequencies = inverse_frequencies.to(position_ids.device, torch.float32)
    angles = position_ids.unsqueeze(1).float() * frequencies
    return angles.cos(), angles.sin()


operator = Operator(
    "rotary(Tensor(a!) qkv, Tensor cos, Tensor sin, str backend) -> ()",
    _check,
    fake=lambda *_: None,
)
