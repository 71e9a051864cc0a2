"""The op ``pool``: every backend against float64, with empty sequences and strided rows."""

import pytest
import torch
from berts import DEVICE, DTYPES
from torch import Tensor

from encoder_fast.backends import NAMES, why_not
from encoder_fast.ops.pool import MODES, pool
from encoder_fast.parity import compare

BACKENDS = [name for name in NAMES if why_not(name, torch.device(DEVICE)) is None]

# One token, an empty sequence first, in the middle and last, equal neighbours, a long one.
LENGTHS = [0, 1, 17, 17, 0, 512, 3, 0]


def packed(lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # rows of a wider tensor: strided, as a slice of a projection would be
    x = torch.randn(sum(lengths), 50, device=DEVICE).to(dtype)[:, :33]
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    return x, cu_seqlens


def by_hand(x: Tensor, lengths: list[int], mode: str, dtype: torch.dtype) -> Tensor:
    rows = []
    for tokens in x.to(dtype).split(lengths):
        if len(tokens) == 0:
            rows.append(tokens.new_zeros(x.shape[1]))
        else:
            rows.append({"cls": tokens[0], "mean": tokens.mean(0), "max": tokens.amax(0)}[mode])
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(backend: str, mode: str, dtype: str) -> None:
    x, cu_seqlens = packed(LENGTHS, DTYPES[dtype])
    out = pool(x, cu_seqlens, mode, backend=backend)
    assert out.dtype == torch.float32
    exact = by_hand(x, LENGTHS, mode, torch.float64)
    plain = by_hand(x, LENGTHS, mode, torch.float32)
    row = compare(mode, out, plain, exact)
    assert row.ok, row
    if mode != "mean":
        assert torch.equal(out, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_pool(backend: str, mode: str) -> None:
    empty, cu_seqlens = packed([0, 0], torch.float32)
    assert torch.equal(
        pool(empty, cu_seqlens, mode, backend=backend), torch.zeros(2, 33, device=DEVICE)
    )
    none, cu_seqlens = packed([], torch.float32)
    assert pool(none, cu_seqlens, mode, backend=backend).shape == (0, 33)


def test_what_it_refuses() -> None:
    x, cu_seqlens = packed([3], torch.float32)
    with pytest.raises(ValueError, match="mode must be one of"):
        pool(x, cu_seqlens, "sum")
    with pytest.raises(ValueError, match="int32"):
        pool(x, cu_seqlens.long())
    with pytest.raises(ValueError, match="shape"):
        pool(x[0], cu_seqlens)
    with pytest.raises(RuntimeError, match="no gradient"):
        pool(x.requires_grad_(), cu_seqlens)


def test_it_is_registered_with_a_fake() -> None:
    x, cu_seqlens = packed(LENGTHS, torch.float32)
    operator = torch.ops.encoder_fast.pool.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (x, cu_seqlens, "mean", "reference"), test_utils=checks)
