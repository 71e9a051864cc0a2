"""Variable-length bidirectional attention over packed tokens.

For each sequence and head, ``softmax(q kᵀ · softmax_scale) v`` over the keys of that sequence
alone. Scores are never in memory as a whole (Dao 2023, FlashAttention-2,
https://arxiv.org/abs/2307.08691); on a CPU without kernels of its own, those of a few heads are.

Two options, of which a call may use one: keys within a window of the query (Longformer, Beltagy et
al. 2020, https://arxiv.org/abs/2004.05150), and a bias by the distance from query to key (T5,
Raffel et al. 2019, https://arxiv.org/abs/1910.10683).
"""

from __future__ import annotations

import torch
from torch import Tensor

from encoder_fast.backends import load, resolve
from encoder_fast.ops._library import Operator, check_cu_seqlens, check_dtype, forbid_grad


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    relative_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend within each packed sequence.

    Args:
        q, k, v: ``(total, H, D)``, float16, bfloat16 or float32 (float64 too on ``reference``); any
            strides with the last one 1, so views of one ``(total, 3, H, D)`` projection are fine.
        cu_seqlens: int32 ``(B + 1,)`` on the same device, from 0 on, not falling; sequence ``b``
            is tokens ``cu_seqlens[b]:cu_seqlens[b + 1]``. Tokens after the last one belong to no
            sequence; their rows come back as zeros.
        max_seqlen: the longest sequence, or more.
        softmax_scale: positive; ``D ** -0.5`` where it is ``None``.
        window_size: query ``i`` of a sequence sees its keys ``j`` with ``|i - j| <= window_size``;
            all of them where it is ``None``.
        relative_bias: ``(H, 2 · R + 1)``, finite, float32 or q's dtype, its last stride 1. Added to
            the scaled score of query ``i`` and key ``j``:
            ``relative_bias[h, clamp(j - i, -R, R) + R]``. Not together with ``window_size``.
        backend: ``auto``, or a backend by name, which runs or raises.

    Returns:
        ``(total, H, D)``, contiguous, in q's dtype.

    Raises:
        ValueError: shapes, strides, dtypes or devices don't fit, or an operand has no memory; on
            a CPU also what ``cu_seqlens`` and ``max_seqlen`` hold.
        BackendUnavailableError: the backend can't run there.
    """
    scale = softmax_scale
    if scale is None:
        # Of other shapes the operator complains.
        scale = q.shape[2] ** -0.5 if q.dim() == 3 and q.shape[2] else 1.0
    name, _ = resolve(backend, q.device)
    return operator.dispatch(
        q, k, v, cu_seqlens, max_seqlen, scale, window_size, relative_bias, name
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    window_size: int | None,
    relative_bias: Tensor | None,
    backend: str,
) -> None:
    if q.dim() != 3 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "q, k and v must have one shape (total, H, D), got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1 and x.numel():
            raise ValueError(f"{name}'s last stride must be 1, got strides {x.stride()}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    check_cu_seqlens(cu_seqlens, q.device)
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must not be negative, got {max_seqlen}")
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {softmax_scale}")
    if window_size is not None and window_size < 0:
        raise ValueError(f"window_size must be None or at least 0, got {window_size}")
    if relative_bias is not None:
        _check_relative_bias(relative_bias, q)
        if window_size is not None:
            raise ValueError(
                f"relative_bias needs window_size=None, got window_size={window_size}: no kernel "
                "has both"
            )
    forbid_grad("attention", q, k, v, relative_bias)
    check_dtype("attention", backend, q.dtype)
    reason = why_no_head_size(backend, q.shape[2])
    if reason is not None:
        raise ValueError(reason)


def _check_relative_bias(relative_bias: Tensor, q: Tensor) -> None:
    shape = tuple(relative_bias.shape)
    if len(shape) != 2 or shape[0] != q.shape[1] or shape[1] % 2 == 0:
        raise ValueError(
            f"relative_bias must have shape (H, 2 * R + 1) with H = {q.shape[1]}, got {shape}"
        )
    if relative_bias.dtype not in (torch.float32, q.dtype):
        raise ValueError(
            f"relative_bias must be torch.float32 or q's {q.dtype}, got {relative_bias.dtype}"
        )
    if relative_bias.stride(1) != 1 and shape[1] > 1:
        raise ValueError(
            f"relative_bias's last stride must be 1, got strides {relative_bias.stride()}"
        )
    if relative_bias.device != q.device:
        raise ValueError(f"relative_bias is on {relative_bias.device}, q on {q.device}")


def why_no_head_size(backend: str, head_size: int, op: str = "attention") -> str | None:
    """Why a backend's attention can't run a head size; ``None`` where it can."""
    module = load(backend)
    # Only backends whose kinds of attention differ have the second.
    known = getattr(module, "HEAD_SIZES_OF_OP", {}).get(op, module.HEAD_SIZES)
    if known is None or head_size in known:
        return None
    return f"backend {backend!r} runs head sizes {sorted(known)} in {op}, got {head_size}"


operator = Operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, "
    "float softmax_scale, SymInt? window_size, Tensor? relative_bias, str backend) -> Tensor",
    _check,
    fake=lambda q, *_: q.new_empty(q.shape),
)
