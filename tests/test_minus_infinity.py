"""Keys whose scores are -inf get no weight, wherever they lie, on every backend at hand.

Tiles of keys are summed up one after the other. Where all scores of the first are -inf, a running
maximum of -inf would make NaN of it and of everything behind. A row all of whose scores are -inf is
NaN in PyTorch, and so it is here.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_oracle import DEVICE, cumulated, softmax_attention
from disentangled_oracle import problem
from test_disentangled_attention import BACKENDS as DISENTANGLED
from test_disentangled_attention import run
from test_ops import BACKENDS, WITH_OPTIONS
from torch import Tensor

from encoder_fast.ops.attention import attention
from encoder_fast.parity import compare

# One entry a kind of tiles. Of the last sequence all scores are -inf.
LENGTHS = {
    "packed": (30, 7, 16, 5),
    "one-64": (40, 63, 9),
    "one-128": (127, 90, 3),
    "loop": (150, 20, 3),
    "longer": (300, 70),
}


def hide_keys(k: Tensor, lengths: tuple[int, ...], half: str) -> None:
    """Put -inf into the first or last half of each sequence's keys, and all of the last one's."""
    ends = list(itertools.accumulate(lengths, initial=0))
    for begin, end in itertools.pairwise(ends):
        middle = (begin + end) // 2
        hidden = slice(begin, middle) if half == "first" else slice(middle, end)
        k[hidden] = float("-inf")
    k[ends[-2] :] = float("-inf")


def check(out: Tensor, eager: Tensor, exact: Tensor) -> None:
    has_weights = ~exact.isnan().any(-1)
    assert torch.equal(out.isnan().any(-1), ~has_weights)
    row = compare("op", out, eager, exact, has_weights)
    assert row.ok, row


def check_attention(
    backend: str,
    lengths: tuple[int, ...],
    half: str,
    dtype: torch.dtype = torch.float16,
    **options,
) -> None:
    # A scale above 1 takes the lowest finite number beyond the range, as a score.
    scale = 2.0
    # Positive queries, or a key of -inf would score inf for some.
    q, k, v = torch.randn(sum(lengths), 3, 1, 32).to(device=DEVICE, dtype=dtype).unbind(1)
    q.abs_()
    hide_keys(k, lengths, half)
    place = {"softmax_scale": scale, "backend": backend}
    out = attention(q, k, v, cumulated(lengths), max(lengths), **place, **options)
    eager, exact = (
        softmax_attention(q, k, v, lengths, scale, each, **options)
        for each in (dtype, torch.float64)
    )
    check(out, eager, exact)


@pytest.mark.parametrize("half", ("first", "last"))
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention(backend: str, lengths: tuple[int, ...], half: str) -> None:
    check_attention(backend, lengths, half)


@pytest.mark.parametrize("half", ("first", "last"))
@pytest.mark.parametrize(
    ("lengths", "dtype"),
    (((30, 7, 5), torch.float16), ((150, 3), torch.float16), ((50, 3), torch.float32)),
    ids=("packed", "loop", "float32"),
)
@pytest.mark.parametrize("backend", WITH_OPTIONS)
def test_window_and_bias(
    backend: str, lengths: tuple[int, ...], dtype: torch.dtype, half: str
) -> None:
    # Where a window reaches hidden keys alone, a row has no finite score either.
    check_attention(backend, lengths, half, dtype, window_size=20)
    bias = torch.randn(1, 41).to(device=DEVICE, dtype=dtype)
    check_attention(backend, lengths, half, dtype, relative_bias=bias)


@pytest.mark.parametrize("half", ("first", "last"))
@pytest.mark.parametrize("lengths", ((30, 7, 5), (70, 3)), ids=("short", "long"))
@pytest.mark.parametrize("backend", DISENTANGLED)
def test_disentangled_attention(backend: str, lengths: tuple[int, ...], half: str) -> None:
    one = problem(lengths, torch.float16, heads=1, tail=0, terms="c2p", device=DEVICE)
    one.q.abs_()
    hide_keys(one.k, lengths, half)
    eager, exact = (one.step_by_step(dtype) for dtype in (torch.float16, torch.float64))
    check(run(one, backend), eager, exact)
