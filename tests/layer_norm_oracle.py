"""What the LayerNorm kernels are held against, shared by their tests.

On a machine with a GPU the tests run there; on any other, Triton interprets the kernels on the CPU.
Import this module ahead of any kernel: a kernel is compiled or interpreted as of its decoration.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton_interpreter import repair_interpreter

    repair_interpreter()

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

GUARD_ROWS = 64


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layer_norm_float64(
    terms: list[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm of the sum of `terms`, all of it in float64."""
    h = torch.stack([term.double() for term in terms]).sum(0)
    h = h - h.mean(1, keepdim=True)
    h = h / (h.square().mean(1, keepdim=True) + eps).sqrt()
    h = h if weight is None else h * weight.double()
    return h if bias is None else h + bias.double()


def error_bound(eager: Tensor, reference: Tensor) -> float:
    """Twice eager's error and one rounding step of its dtype at the largest value."""
    _, exponent = torch.frexp(reference.abs().max())
    rounding_step = torch.finfo(eager.dtype).eps * 2.0 ** (exponent.item() - 1)
    return 2 * max_error(eager, reference) + rounding_step


def max_error(actual: Tensor, reference: Tensor) -> float:
    return (actual.double() - reference).abs().max().item()


def surrounded_by_nan(values: Tensor, row_stride: int | None = None) -> Tensor:
    """The same values, as a view in a buffer that is NaN wherever it is none of them.

    Reading beyond a row or a column shows in the result. The rows keep 16-byte alignment where
    their stride allows it.
    """
    rows, columns = values.shape
    row_stride = row_stride or columns
    buffer = torch.full((16 + rows * row_stride + 64,), torch.nan, dtype=values.dtype)
    view = buffer.to(DEVICE)[16:].as_strided((rows, columns), (row_stride, 1))
    return view.copy_(values)


@contextmanager
def guarded_empty() -> Iterator[None]:
    """Make `torch.empty` give NaN, with rows behind it that must still be NaN at the end.

    A row that a kernel forgets is NaN in its result, a row too many is an assertion here.
    """
    guards = []

    def empty(shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        rows, columns = shape
        buffer = torch.full((rows + GUARD_ROWS, columns), torch.nan, dtype=dtype, device=device)
        guards.append(buffer[rows:])
        return buffer[:rows]

    with patch("torch.empty", empty):
        yield
    assert guards, "the launcher did not allocate with torch.empty"
    for guard in guards:
        assert guard.isnan().all(), "written beyond the last row"
