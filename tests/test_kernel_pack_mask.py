"""The Triton kernels that read a mask, against the same in plain PyTorch: bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from layer_norm_oracle import DEVICE, dtype_name
from torch import Tensor

from encoder_fast.backends import masks
from encoder_fast.kernels import pack_mask
from encoder_fast.kernels.pack_mask import BLOCK_B, BLOCK_S

GUARD, POISON = 8, 99

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Make `torch.empty` give what no result holds, with more of it behind, which has to stay."""
    guards = []

    def empty(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = torch.full((size + GUARD,), POISON, dtype=torch.int64, device=device).to(dtype)
        guards.append(buffer[size:])
        return buffer[:size]

    with patch("torch.empty", empty):
        yield
    assert guards, "the launcher did not allocate with torch.empty"
    for guard in guards:
        assert torch.equal(guard, torch.full_like(guard, POISON)), "written beyond the end"


def check(
    mask: Tensor, input_ids: Tensor | None = None, vocab_size: int = 0, onlookers: bool = True
) -> list[int]:
    """Compare with PyTorch's operations; returns the facts."""
    facts, lengths, headless = masks.count_tokens(mask, input_ids, vocab_size, onlookers)
    with poisoned_empty():
        ours = pack_mask.count_tokens(mask, input_ids, vocab_size, onlookers)
    assert ours[0].dtype == torch.int64 and ours[0].tolist() == facts.tolist()
    assert ours[1].tolist() == lengths.tolist()
    assert ours[2].dtype == torch.bool and ours[2].tolist() == headless.tolist()

    total, n_headless = int(facts[0]), int(facts[2])
    for count in {0, n_headless if onlookers else 0}:
        with poisoned_empty():
            places = pack_mask.place_tokens(mask, *ours[1:], total, count)
        expected = masks.place_tokens(mask, lengths, headless, total, count)
        for place, theirs in zip(places, expected, strict=True):
            assert (place is None) == (theirs is None)
            if place is not None and theirs is not None:
                assert place.dtype == theirs.dtype and place.tolist() == theirs.tolist()
    return facts.tolist()


def rows(*lines: str) -> Tensor:
    return torch.tensor([[int(c) for c in line] for line in lines], device=DEVICE)


def random_mask(B: int, S: int) -> Tensor:
    return torch.randint(0, 2, (B, S), device=DEVICE)


# Right, left and both, holes, an empty row between others and at the end; five rows are two
# programs.
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_any_type(dtype: torch.dtype) -> None:
    mask = rows("1100", "0011", "0110", "0000", "1011", "0101", "1111", "0000")
    assert check(mask.to(dtype)) == [15, 4, 3, 1, 0, 0]


# Columns on both sides of a block and of two; rows on both sides of a program, where cu_seqlens has
# one value more than there are rows.
@pytest.mark.parametrize(
    "S", [1, BLOCK_S - 1, BLOCK_S, BLOCK_S + 1, 2 * BLOCK_S + 1], ids="S{}".format
)
@pytest.mark.parametrize("B", [1, BLOCK_B - 1, BLOCK_B, BLOCK_B + 1], ids="B{}".format)
def test_shapes(B: int, S: int) -> None:
    check(random_mask(B, S))


def test_one_run_across_blocks_is_no_gap() -> None:
    mask = torch.zeros(2, 3 * BLOCK_S, dtype=torch.int64, device=DEVICE)
    mask[:, 5:-5] = 1
    assert check(mask)[3] == 0
    mask[1, BLOCK_S] = 0
    assert check(mask)[3] == 1


def test_more_rows_than_are_added_up_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_mask, "BLOCK_BEFORE", 8)
    check(random_mask(23, 3))


def test_strides() -> None:
    mask = random_mask(9, 7)
    assert check(mask.T) == check(mask.T.contiguous())
    assert check(mask[::2, 1::3]) == check(mask[::2, 1::3].contiguous())
    check(mask[:1].expand(6, -1))
    check(mask[:, :1].expand(-1, 6))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (2, torch.int64),
        (-1, torch.int8),
        (256, torch.int32),
        (1 << 32, torch.int64),
        (0.5, torch.float16),
        (2.0, torch.bfloat16),
        (torch.nan, torch.float32),
        (torch.nan, torch.bfloat16),
        (-torch.inf, torch.float32),
        # both are 0 and 1 in float32
        (1e-300, torch.float64),
        (1 + 2**-52, torch.float64),
    ],
)
def test_other_values(value: float, dtype: torch.dtype) -> None:
    mask = rows("110", "011").to(dtype)
    mask[1, 0] = value
    assert check(mask) == [5, 3, 0, 0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=dtype_name)
def test_minus_zero_is_padding(dtype: torch.dtype) -> None:
    assert check(rows("100", "110").to(dtype).masked_fill(rows("011", "001").bool(), -0.0))[0] == 3


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_name)
@pytest.mark.parametrize("wrong", [-1, 7, 1 << 30])
def test_ids(wrong: int, dtype: torch.dtype) -> None:
    mask = rows("110", "011", "000")

    def outside(row: int, column: int, onlookers: bool) -> bool:
        ids = torch.tensor([[0, 6, 1]], device=DEVICE).repeat(3, 1)
        ids[row, column] = wrong
        answers = [
            check(mask, each.to(dtype), 7, onlookers)[5] == 1
            for each in (ids, ids.T.contiguous().T)
        ]
        assert answers[0] == answers[1]
        return answers[0]

    assert outside(0, 0, False) and outside(1, 2, False)
    assert not outside(0, 2, True) and not outside(2, 0, True)  # padding that nobody reads
    assert outside(1, 0, True) and not outside(1, 0, False)  # an onlooker
    assert check(mask * 0, mask.to(dtype), 0)[5] == 0  # no id is in range, and none is a token's


def test_random_masks() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(data=st.data(), B=st.integers(1, 9), S=st.integers(1, 6))
    def check_one(data: Any, B: int, S: int) -> None:
        bits = data.draw(st.lists(st.booleans(), min_size=B * S, max_size=B * S))
        check(torch.tensor(bits, device=DEVICE).view(B, S))

    check_one()
