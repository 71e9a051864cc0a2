"""The kernels add_layer_norm, and the row tiles that Triton's shares with embed_layer_norm."""

from __future__ import annotations

from itertools import product
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from kernel_backends import kernel_backends
from layer_norm_oracle import (
    DEVICE,
    DTYPES,
    dtype_name,
    error_bound,
    guarded_empty,
    layer_norm_float64,
    max_error,
    surrounded_by_nan,
)
from torch import Tensor

from encoder_fast.backends import load
from encoder_fast.kernels.row_norm import ROW_TILES, address, row_align, row_tile, tile_for

# Both sides of the rungs of ROW_TILES; 1 has no variance, 7 and 1000 fill no 16-byte access, 312 is
# TinyBERT, a multiple of 8 and not of 16; 384, 768 and 1024 are the widths of most encoders.
WIDTHS = [1, 7, 64, 127, 128, 312, 384, 512, 768, 1000, 1024, 2560, 4096, 8192]


def rows_for(N: int) -> int:
    """Enough numbers that eager's largest error among them is no matter of luck."""
    return 33 if N <= 128 else 17 if N <= 1024 else 5


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def eager(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
) -> Tensor:
    """What a Hugging Face layer computes: each step rounded to the dtype of x."""
    h = x if x_bias is None else x + x_bias.to(x.dtype)
    h = h if residual is None else h + residual
    vectors = [v for v in (weight, bias) if v is not None]
    if any(v.dtype != x.dtype for v in vectors):
        h = h.float()
        weight = None if weight is None else weight.float()
        bias = None if bias is None else bias.float()
    return F.layer_norm(h, h.shape[1:], weight, bias, eps).to(x.dtype)


@pytest.fixture(params=kernel_backends())
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """A backend with kernels of its own."""
    return load(request.param)


def check(
    kernels: ModuleType,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-12,
    x_bias: Tensor | None = None,
) -> None:
    with guarded_empty():
        out = kernels.add_layer_norm(x, residual, weight, bias, eps, x_bias)
    assert out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous()
    with guarded_empty():
        beside, total = kernels.add_layer_norm_sum(x, residual, weight, bias, eps, x_bias)
    assert torch.equal(beside, out), "storing the sum changes nothing"

    terms = [x, *(t for t in (residual,) if t is not None)]
    terms += [] if x_bias is None else [x_bias.expand_as(x)]
    reference = layer_norm_float64(terms, weight, bias, eps)
    bound = error_bound(eager(x, residual, weight, bias, eps, x_bias), reference)
    assert max_error(out, reference) <= bound
    exact = torch.stack([term.double() for term in terms]).sum(0)
    rounded = x if x_bias is None else x + x_bias.to(x.dtype)
    rounded = rounded if residual is None else rounded + residual
    assert max_error(total, exact) <= error_bound(rounded, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("N", WIDTHS, ids="N{}".format)
def test_widths(kernels, N, dtype):
    M = rows_for(N)
    x, residual = (surrounded_by_nan(random(M, N, dtype=dtype)) for _ in range(2))
    weight, bias, x_bias = (surrounded_by_nan(random(1, N, dtype=dtype))[0] for _ in range(3))
    check(kernels, x, residual, weight, bias, x_bias=x_bias)


# No row, one row, a program that is not full, several programs and a rest.
@pytest.mark.parametrize("M", [0, 1, 5, 33], ids="M{}".format)
@pytest.mark.parametrize("N", [128, 384, 1024, 2560], ids="N{}".format)
def test_rows(kernels, M, N):
    if M == 0:
        x, residual = random(0, N), random(0, N)
        out = kernels.add_layer_norm(x, residual, random(N), random(N), 1e-12, None)
        assert out.shape == (0, N)
        return
    x, residual = (surrounded_by_nan(random(M, N, dtype=torch.float16)) for _ in range(2))
    check(kernels, x, residual, random(N), random(N), x_bias=random(N))


@pytest.mark.parametrize("has", list(product([False, True], repeat=4)), ids=str)
def test_absent_operands(kernels, has):
    M, N = 33, 127
    has_residual, has_weight, has_bias, has_x_bias = has
    check(
        kernels,
        random(M, N),
        random(M, N) if has_residual else None,
        random(N) if has_weight else None,
        random(N) if has_bias else None,
        x_bias=random(N) if has_x_bias else None,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("N", [312, 768], ids="N{}".format)
def test_half_rows_with_float32_vectors(kernels, N, dtype):
    x, residual = (random(rows_for(N), N, dtype=dtype) for _ in range(2))
    check(kernels, x, residual, random(N), random(N), x_bias=random(N))


# Strides that are no multiple of anything, that are of 8 alone, of 16; and one row for all.
@pytest.mark.parametrize("strides", [(769, 768), (776, 769), (784, 2304), (768, 0)], ids=str)
def test_strided_rows(kernels, strides):
    N, dtype = 768, torch.float16
    x = surrounded_by_nan(random(9, N, dtype=dtype), strides[0])
    if strides[1]:
        residual = surrounded_by_nan(random(9, N, dtype=dtype), strides[1])
    else:
        residual = random(1, N, dtype=dtype).expand(9, N)
    assert (x.stride(0), residual.stride(0)) == strides
    check(kernels, x, residual, random(N, dtype=dtype), random(N, dtype=dtype))


def test_rows_that_are_not_aligned_to_an_access(kernels):
    x = random(1 + 5 * 768, dtype=torch.float16)[1:].view(5, 768)
    check(kernels, x, None, random(768), random(768))


@pytest.mark.large_memory
def test_row_offset_beyond_int32(kernels):
    stride = 2**29 + 8
    try:
        buffer = torch.empty(4 * stride + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no room for rows far apart: {error}")
    x = buffer.as_strided((5, 64), (stride, 1))
    assert 4 * stride > 2**31
    x.copy_(random(5, 64))
    check(kernels, x, None, random(64), random(64))


def with_large_mean(M: int, N: int) -> Tensor:
    """Rows whose mean is 10,000 times their deviation."""
    return 100 + 0.01 * random(M, N)


@pytest.mark.parametrize("N", [7, 384, 768, 1024, 2560], ids="N{}".format)
def test_large_mean(kernels, N):
    M = rows_for(N)
    check(kernels, with_large_mean(M, N), None, random(N), random(N))
    check(
        kernels,
        with_large_mean(M, N),
        with_large_mean(M, N),
        random(N),
        random(N),
        x_bias=random(N),
    )


def test_large_mean_tells_a_one_pass_variance():
    N = 768
    x = with_large_mean(9, N)
    mean = x.mean(1, keepdim=True)
    variance = x.square().mean(1, keepdim=True) - mean.square()
    one_pass = (x - mean) * torch.rsqrt(variance.clamp(min=0) + 1e-12)
    reference = layer_norm_float64([x], None, None, 1e-12)
    bound = error_bound(eager(x, None, None, None, 1e-12, None), reference)
    assert max_error(one_pass, reference) > 10 * bound


# Divided by the square root of the smallest epsilon that models use, a rounding error of the mean
# would be as large as the result.
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("N", [1, 7, 312, 768, 1000], ids="N{}".format)
def test_constant_rows(kernels, N, dtype):
    x = torch.tensor([0.0, 1.0, -0.1, 5.3], device=DEVICE).to(dtype)[:, None].repeat(1, N)
    check(kernels, x, None, random(N, dtype=dtype), random(N, dtype=dtype))


# Rows that share a warp, that have one each, and that have several.
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("N", [64, 384, 1000, 2560], ids="N{}".format)
def test_a_row_that_is_not_finite_stays_alone(kernels, N, bad):
    x = random(9, N, dtype=torch.float16)
    expected = kernels.add_layer_norm(x, None, None, None, 1e-12, None)
    x[4, N // 2] = bad
    out = kernels.add_layer_norm(x, None, None, None, 1e-12, None)
    assert out[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(out[others], expected[others])


# A deviation of 0.001 makes an epsilon of 1e-5 ten times the variance.
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_epsilon(kernels, eps):
    N = 384
    check(kernels, 0.001 * random(rows_for(N), N), None, random(N), random(N), eps)


def test_tiles_cover_every_width_without_idle_lanes():
    for N in range(1, ROW_TILES[-1][0] + 1):
        tile = row_tile(N)
        assert tile.lanes * tile.rows == 32 * tile.num_warps
        # Where a piece would be empty, its lanes would idle.
        assert tile.lanes <= 32 or N > 1024, "up to 1024 a row stays in its warp"
        for itemsize in (2, 4):
            pieces = -(-N // tile.block_n(itemsize))
            assert pieces * 16 // itemsize <= 40, "registers"
    for N, itemsize in product((384, 512, 768, 1024), (2, 4)):
        assert N % row_tile(N).block_n(itemsize) == 0, "a lane is masked off"


def test_rows_that_begin_anywhere_take_a_wider_tile():
    cpu = torch.device("cpu")
    for N in range(1, ROW_TILES[-1][0] + 1):
        for itemsize in (2, 4):
            align = row_align(itemsize, N)
            tile = tile_for("add_layer_norm", N, itemsize, align, cpu)
            narrow = align * itemsize < 16
            assert tile == row_tile(min(2 * N, ROW_TILES[-1][0]) if narrow else N)


def test_width_beyond_the_last_tile():
    with pytest.raises(ValueError, match="N must be at most 8192, got 8193"):
        row_tile(8193)


def test_an_address_counts_as_a_stride():
    x = random(33, 769)[:, 1:]
    assert address(x, x.element_size()) % 4 == 1
    assert address(None, 4) == 0


def test_row_align_is_what_all_rows_keep():
    assert row_align(2, 768, 768) == 8
    assert row_align(2, 312, 0) == 8
    assert row_align(4, 312) == 4
    assert row_align(2, 312, 12) == 4
    assert row_align(2, 769, 768) == 1
