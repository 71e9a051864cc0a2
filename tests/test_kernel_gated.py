"""The Triton kernel gated, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_norm_oracle import (
    DEVICE,
    DTYPES,
    dtype_name,
    error_bound,
    guarded_empty,
    max_error,
    surrounded_by_nan,
)
from torch import Tensor

from encoder_fast.kernels.gated import ACTIVATIONS, gated


def eager(x: Tensor, activation: str) -> Tensor:
    """As a Hugging Face layer computes it, each step rounded to the dtype of x."""
    features, gate = x.chunk(2, dim=-1)
    if activation == "relu":
        return F.relu(features) * gate
    return F.gelu(features, approximate="tanh" if activation == "gelu_tanh" else "none") * gate


def check(x: Tensor, activation: str) -> None:
    with guarded_empty():
        out = gated(x, activation)
    assert out.is_contiguous() and out.shape == (x.shape[0], x.shape[1] // 2)
    exact = eager(x.double(), activation)
    if x.shape[0]:
        assert max_error(out, exact) <= error_bound(eager(x, activation), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    # in the tails erf and tanh are 1, and one less than that is all of what remains
    x = torch.randn(33, 2 * 128, device=DEVICE) * 4
    check(surrounded_by_nan(x.to(dtype)), activation)


# Columns on both sides of a tile, and widths that fill no 16-byte access.
@pytest.mark.parametrize("N", [1, 7, 127, 128, 136, 1152], ids="N{}".format)
@pytest.mark.parametrize("M", [0, 1, 9], ids="M{}".format)
def test_shapes(M: int, N: int) -> None:
    check(surrounded_by_nan(torch.randn(M, 2 * N, device=DEVICE).half()), "gelu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_are_seen(activation: str) -> None:
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, -60.0, 60.0]
    x = torch.tensor([[*special, *([1.0] * len(special))]], device=DEVICE)
    # In float32 PyTorch makes NaN of gelu(inf) on a CPU.
    ours, theirs = gated(x, activation), eager(x.double(), activation).float()
    torch.testing.assert_close(ours[0, :2], theirs[0, :2], equal_nan=True)
    torch.testing.assert_close(ours[0, 3:], theirs[0, 3:], rtol=1e-6, atol=1e-6)
