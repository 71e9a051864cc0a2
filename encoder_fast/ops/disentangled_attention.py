"""Disentangled attention over packed tokens (He et al. 2020, DeBERTa,
https://arxiv.org/abs/2006.03654).

For query i and key j of one sequence, scores come from the content of both and from the content of
each with their relative position::

    s[i, j] = q_i · k_j  +  q_i · pos_key[row(i - j)]  +  k_j · pos_query[row(i - j)]
    out     = softmax(s · softmax_scale) v

DeBERTa's "c2p" term is the one with ``pos_key``, "p2c" the one with ``pos_query``. Both tables are
the projected position embeddings. ``row`` gives each distance its row of them
(:func:`make_row_of_distance`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from encoder_fast.backends import resolve
from encoder_fast.ops._library import Operator, check_cu_seqlens, check_dtype, forbid_grad
from encoder_fast.ops.attention import why_no_head_size


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    row_of_distance: Tensor,
    *,
    pos_key: Tensor | None = None,
    pos_query: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend within each packed sequence by content and by relative position.

    Args:
        q, k, v: ``(total, H, D)``, float16, bfloat16 or float32 (float64 too on ``reference``); any
            strides with the last one 1.
        cu_seqlens: int32 ``(B + 1,)`` on the same device, from 0 on, not falling; sequence ``b``
            is tokens ``cu_seqlens[b]:cu_seqlens[b + 1]``. Tokens after the last one belong to no
            sequence; their rows come back as zeros.
        max_seqlen: the longest sequence, or more.
        row_of_distance: int32 ``(2R + 1,)``, contiguous, on the same device: the tables' row for
            each distance i - j from -R to R. Distances beyond have the row at that end. The values
            are not looked at: they must be rows of the tables.
        pos_key, pos_query: ``(rows, H, D)`` in q's dtype, last stride 1; without one of them its
            term is left out.
        softmax_scale: positive; where it is ``None``, ``(D · terms) ** -0.5`` over the terms that
            there are, as DeBERTa has it.
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
        terms = 1 + (pos_key is not None) + (pos_query is not None)
        # Of other shapes the operator complains.
        scale = (q.shape[2] * terms) ** -0.5 if q.dim() == 3 and q.shape[2] else 1.0
    name, _ = resolve(backend, q.device, frozenset({"disentangled_attention"}))
    return operator.dispatch(
        q, k, v, pos_key, pos_query, row_of_distance, cu_seqlens, max_seqlen, scale, name
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    row_of_distance: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    backend: str,
) -> None:
    if q.dim() != 3 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "q, k and v must have one shape (total, H, D), got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    tables = [(name, x) for name, x in (("pos_key", pos_key), ("pos_query", pos_query))]
    for name, x in (("q", q), ("k", k), ("v", v), *tables):
        if x is None:
            continue
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}")
        if x.dim() != 3 or x.shape[1:] != q.shape[1:]:
            raise ValueError(
                f"{name} must be (rows, H, D) with H and D of q {tuple(q.shape)}, got "
                f"{tuple(x.shape)}"
            )
        if x.stride(2) != 1 and x.numel():
            raise ValueError(f"{name}'s last stride must be 1, got strides {x.stride()}")
    check_cu_seqlens(cu_seqlens, q.device)
    rows = row_of_distance
    if rows.dtype != torch.int32 or rows.dim() != 1 or rows.shape[0] % 2 == 0:
        raise ValueError(
            "row_of_distance must be int32 of shape (2R + 1,), got "
            f"{rows.dtype} of shape {tuple(rows.shape)}"
        )
    if rows.device != q.device:
        raise ValueError(f"row_of_distance is on {rows.device}, q on {q.device}")
    if not rows.is_contiguous():
        raise ValueError(f"row_of_distance must be contiguous, got stride {rows.stride()}")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must not be negative, got {max_seqlen}")
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {softmax_scale}")
    forbid_grad("disentangled_attention", q, k, v, pos_key, pos_query)
    check_dtype("disentangled_attention", backend, q.dtype)
    reason = why_no_head_size(backend, q.shape[2], "disentangled_attention")
    if reason is not None:
        raise ValueError(reason)


def make_row_of_distance(
    span: int, buckets: int, max_distance: int, device: torch.device
) -> Tensor:
    """The ``row_of_distance`` of a DeBERTa.

    Args:
        span: half the rows of the position tables; distance 0 has row ``span``.
        buckets: without log buckets 0 or less: the row is the distance, clamped. Else distances up
            to ``buckets // 2`` have a row each, and those up to ``max_distance`` share
            the rest of them, the farther apart the more to a row.
        max_distance: where the logarithm ends.
        device: where the vector goes, and where the logarithms are taken: a distance at the edge of
            a bucket then falls to the side that it does in the original on this device.

    Returns:
        int32 ``(2R + 1,)``, R being as far as rows still change.
    """
    middle = buckets // 2
    # The last distance that may have a row of its own; a few more, should logarithms round.
    reach = span
    if buckets > 0:
        reach = max(middle + 1, max_distance + 1)
        # With an odd number of buckets the end of the table is one row beyond the logarithm's.
        if span > 2 * middle and middle > 1:
            growth = (max_distance - 1) / middle
            reach = max(reach, int(middle * growth ** ((middle + 1) / (middle - 1))) + 2)
    distance = torch.arange(-reach, reach + 1, device=device)
    if buckets > 0:
        distance = _log_buckets(distance, middle, max_distance)
    return (distance + span).clamp(0, 2 * span - 1).to(torch.int32)


def _log_buckets(distance: Tensor, middle: int, max_distance: int) -> Tensor:
    """Distances as they are up to ``middle``, and logarithmic steps beyond it.

    In float32 and in the original's order of operations, for the sake of the buckets' edges.
    """
    is_near = (distance < middle) & (distance > -middle)
    size = torch.where(is_near, middle - 1, distance.abs())
    # On the CPU wherever the distances are: a division by a scalar from there rounds differently.
    growth = torch.log(torch.tensor((max_distance - 1) / middle, device="cpu"))
    steps = torch.ceil(torch.log(size / middle) / growth * (middle - 1)) + middle
    return torch.where(size <= middle, distance.to(steps.dtype), steps * distance.sign()).long()


operator = Operator(
    "disentangled_attention(Tensor q, Tensor k, Tensor v, Tensor? pos_key, Tensor? pos_query, "
    "Tensor row_of_distance, Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale, "
    "str backend) -> Tensor",
    _check,
    fake=lambda q, *_: q.new_empty(q.shape),
)
