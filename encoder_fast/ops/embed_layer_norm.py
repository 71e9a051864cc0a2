"""Embedding lookup, addition and LayerNorm in one pass.

``LayerNorm(word[ids] + token_type[types] + position[positions])``, a row for each packed token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from encoder_fast.backends import resolve
from encoder_fast.ops._library import Operator, check_dtype, forbid_grad
from encoder_fast.ops.add_layer_norm import check_vector, check_width


def embed_layer_norm(
    input_ids: Tensor,
    word: Tensor,
    position_ids: Tensor | None = None,
    position: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-12,
    *,
    backend: str = "auto",
) -> Tensor:
    """Look up, add and normalise.

    Args:
        input_ids, position_ids, token_type_ids: int64 or int32 ``(total,)``; the last two may be
            ``None`` together with their tables.
        word, position, token_type: ``(rows, N)`` tables of one dtype, last stride 1.
        weight, bias: ``(N,)``, contiguous, or ``None``.
        eps: added to the variance.
        backend: ``auto``, or a backend by name, which runs or raises.

    Returns:
        ``(total, N)``, contiguous, in the tables' dtype.

    Raises:
        ValueError: shapes, strides, dtypes or devices don't fit, or an operand has no memory.
        IndexError: an id outside its table, on the CPU. On a GPU, where finding out would mean to
            wait for the device, that token's row comes back as NaN.
        BackendUnavailableError: the backend can't run there.
    """
    name, _ = resolve(backend, word.device)
    return operator.dispatch(
        input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, name
    )


def _check(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> None:
    pairs = (
        ("input_ids", input_ids, "word", word),
        ("position_ids", position_ids, "position", position),
        ("token_type_ids", token_type_ids, "token_type", token_type),
    )
    for ids_name, ids, table_name, table in pairs:
        if (ids is None) != (table is None):
            raise ValueError(f"{ids_name} and {table_name} go together: give both or neither")
        if ids is None or table is None:
            continue
        if not ids.is_contiguous():
            raise ValueError(f"{ids_name} must be contiguous, got stride {ids.stride()}")
        if ids.dtype not in (torch.int64, torch.int32) or ids.shape != input_ids.shape:
            raise ValueError(
                f"{ids_name} must be int64 or int32 of shape {tuple(input_ids.shape)}, got "
                f"{ids.dtype} of shape {tuple(ids.shape)}"
            )
        if table.dim() != 2 or table.shape[1] != word.shape[-1] or table.dtype != word.dtype:
            raise ValueError(
                f"{table_name} must be (rows, {word.shape[-1]}) {word.dtype}, got "
                f"{tuple(table.shape)} {table.dtype}"
            )
        if table.stride(1) != 1:
            raise ValueError(f"{table_name}'s last stride must be 1, got {table.stride()}")
        if ids.device != word.device or table.device != word.device:
            raise ValueError(f"{ids_name} and {table_name} must be on {word.device}")
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids must have shape (total,), got {tuple(input_ids.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        check_vector(name, vector, word.shape[1], word.device)
    forbid_grad("embed_layer_norm", word, position, token_type, weight, bias)
    check_dtype("embed_layer_norm", backend, word.dtype)
    check_width(backend, word.shape[1])


operator = Operator(
    "embed_layer_norm(Tensor input_ids, Tensor? position_ids, Tensor? token_type_ids, Tensor word, "
    "Tensor? position, Tensor? token_type, Tensor? weight, Tensor? bias, float eps, str backend) "
    "-> Tensor",
    _check,
    fake=lambda ids, _positions, _types, word, *_: word.new_empty(ids.shape[0], word.shape[1]),
)
