"""The CPU's LayerNorm kernel, on each instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch
from berts import DTYPES
from cpu_isas import MARKS, isa, norm_and_check, poisoned, pytorch_is_not_asked

from encoder_fast.ops.add_layer_norm import add_layer_norm

pytestmark = MARKS

__all__ = ["isa", "poisoned", "pytorch_is_not_asked"]  # fixtures


@pytest.mark.parametrize("residual", [False, True], ids=["x", "x+residual"])
@pytest.mark.parametrize("names", ["", "x_bias", "weight", "bias", "weight+bias+x_bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48, 384, 768, 1024, 8192])
@pytest.mark.usefixtures("isa", "poisoned")
def test_add_layer_norm(width: int, dtype: str, names: str, residual: bool) -> None:
    # a mean far from 0, for the variance
    x, other = (3 + torch.randn(2, 37, width)).to(DTYPES[dtype])
    vectors = {name: torch.randn(width).to(x.dtype) for name in names.split("+") if name}
    norm_and_check(x, vectors, other if residual else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa", "poisoned")
def test_more_rows_than_one_share_takes(dtype: str) -> None:
    # 1,365 rows of 48, and one more
    x = torch.randn(1366, 48).to(DTYPES[dtype])
    norm_and_check(x, {"weight": torch.randn(48).to(x.dtype)})


@pytest.mark.usefixtures("isa")
def test_rows_of_equal_elements() -> None:
    # eps is as BERT's: what is left of the mean would come out a thousand times as large
    rows = torch.randn(100, 1).expand(100, 768).contiguous()
    output = add_layer_norm(rows, eps=1e-12, backend="cpu")
    assert torch.equal(output, torch.zeros_like(rows))
    assert add_layer_norm(rows, eps=0.0, backend="cpu").isnan().all()


def test_no_rows() -> None:
    assert add_layer_norm(torch.empty(0, 32), backend="cpu").shape == (0, 32)
