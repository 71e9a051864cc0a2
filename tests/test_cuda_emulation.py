"""The emulation of CUDA's execution model that the CUDA kernels are tested on.

The fragment layouts come from tests/ptx_interpreter.py, which has them from the tables of the PTX
ISA, apart from the emulation's own arithmetic.
"""

from __future__ import annotations

from types import ModuleType

import cuda_host_build
import numpy as np
import pytest
import torch
from ptx_interpreter import a_element, b_element, c_element, matrix_element

reason = cuda_host_build.why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    return cuda_host_build.build_probe()


def words(values: list[torch.Tensor]) -> list[int]:
    """Pairs of 16-bit numbers as registers, the first in the low half."""
    bits = torch.stack(values).view(torch.int16).numpy().view(np.uint16)
    return bits.view(np.uint32).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mma(probe: ModuleType, dtype: torch.dtype) -> None:
    # Small integers: each sum is exact, whatever its order.
    a, b = torch.randint(-8, 9, (16, 16)).to(dtype), torch.randint(-8, 9, (16, 8)).to(dtype)
    c = torch.randn(16, 8)
    c = (c * 64).round() / 64
    fragments: list[int] = []
    for lane in range(32):
        fragments += words([a[a_element(lane, i)] for i in range(8)])
        fragments += words([b[b_element(lane, i)] for i in range(4)])
        values = torch.stack([c[c_element(lane, i)] for i in range(4)])
        fragments += values.numpy().view(np.uint32).tolist()
    out = np.array(probe.mma(dtype == torch.bfloat16, fragments), np.uint32).view(np.float32)
    expected = a.float() @ b.float() + c
    for lane in range(32):
        for i in range(4):
            assert out[4 * lane + i] == expected[c_element(lane, i)].item(), (lane, i)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "trans"])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix(probe: ModuleType, matrices: int, transposed: bool) -> None:
    """Thread 4r + c holds elements 2c and 2c + 1 of row r; with .trans, of column r."""
    values = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    out = probe.ldmatrix(matrices, transposed, values.reshape(-1).view(np.uint32).tolist())
    out = np.array(out, np.uint32).view(np.uint16).reshape(32, matrices, 2)
    for lane in range(32):
        for matrix in range(matrices):
            expected = [values[matrix][at] for at in matrix_element(lane, transposed)]
            assert out[lane, matrix].tolist() == expected


def test_shuffles_and_vote(probe: ModuleType) -> None:
    out = np.array(probe.shuffles()).reshape(32, 5)
    thirds = sum(1 << lane for lane in range(0, 32, 3))
    for lane in range(32):
        expected = [5, lane ^ 16, max(lane - 1, 0), min(lane + 1, 31), thirds]
        assert out[lane].tolist() == expected


def test_parts_of_a_warp_go_their_own_way(probe: ModuleType) -> None:
    assert probe.half_warps() == [sum(range(16))] * 16 + [sum(range(16, 32))] * 16


def test_copies_fill_with_zeros(probe: ModuleType) -> None:
    assert probe.copies(list(range(1, 9))) == [1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 4]


def test_named_barriers_hand_over(probe: ModuleType) -> None:
    assert probe.hand_over() == [100 * i + lane for i in range(3) for lane in range(32)]


def test_indices(probe: ModuleType) -> None:
    expected = [3_000_000 + 1000 * block + thread for block in range(3) for thread in range(64)]
    assert probe.indices() == expected


def test_half_precision(probe: ModuleType) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype, widen, narrow in (
        (torch.float16, probe.half_to_float, probe.float_to_half),
        (torch.bfloat16, probe.bfloat16_to_float, probe.float_to_bfloat16),
    ):
        numbers = bits.view(dtype).float()
        wide = torch.tensor([widen(i) for i in range(1 << 16)])
        assert torch.equal(wide.nan_to_num(nan=7.0), numbers.nan_to_num(nan=7.0))
        # The numbers themselves, halfway to the next, and a little to both sides of that.
        finite = numbers[numbers.isfinite()].double()
        step = (numbers[1:] - numbers[:-1])[: finite.shape[0] // 2 - 1].double()
        middle = finite[: step.shape[0]] + step / 2
        tried = torch.cat([finite, middle, middle * (1 + 1e-6), middle * (1 - 1e-6)]).float()
        tried = tried[:: 7 if dtype == torch.bfloat16 else 3]
        tried = torch.cat([tried, -tried, torch.tensor([65519.0, 65520.0, 3.4e38, float("inf")])])
        narrowed = torch.tensor([narrow(x) for x in tried.tolist()], dtype=torch.int32)
        assert torch.equal(narrowed.to(torch.int16).view(dtype), tried.to(dtype))
        assert torch.tensor([narrow(float("nan"))]).to(torch.int16).view(dtype).isnan().all()


# What the emulation says of each mistake.
MISTAKES = {
    "no barrier before a read": "thread 32: writes .* 128 with no barrier since thread 0",
    "no barrier before reuse": "(reads|writes) shared address .* with no barrier since thread",
    "no sync_warp": "(reads|writes) shared address .* with no barrier since thread",
    "no wait": "a cp.async has not been waited for",
    "one group too many": "a cp.async has not been waited for",
    "wait without barrier": "a cp.async has not been waited for|with no barrier since thread",
    "write under a copy": "a cp.async has not been waited for",
    "a thread skips a barrier": "0-6 8-63 wait for barrier 0\n +threads 7 wait for shuffle of",
    "a lane skips a shuffle": "0-31 40 have ended\n +threads 32-39 41-63 wait for shuffle",
    "a lane that is not named": "shuffle of lanes 1-31 by lane 0",
    "lanes at different operations": "while others are at",
    "shuffle from an absent lane": "shuffle reads lane 20, which takes no part",
    "shared overrun": "shared access of 4 bytes at 1136, the block has 1024",
    "shared misaligned": "shared access of 16 bytes at 8 is not aligned",
    "global overrun": "thread 63: load of 4 bytes outside every operand",
    "global underrun": "thread 0: store of 4 bytes outside every operand",
    "global misaligned": "global access of 16 bytes is not aligned",
    "store to an input": "store to an operand that is only read",
    "copy overrun": "load of 4 bytes outside every operand",
    "barrier counts differ": "barrier 3 for 32 threads, others said 64",
}


def test_every_mistake_is_listed(probe: ModuleType) -> None:
    assert set(probe.mistakes()) == {*MISTAKES, "none"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(probe: ModuleType, mistake: str) -> None:
    with pytest.raises(probe.EmulationError, match=MISTAKES[mistake]):
        probe.mistake(mistake)
    # What is left of that launch is in nobody's way.
    assert len(probe.mistake("none")) == 64


def test_without_a_mistake_all_is_well(probe: ModuleType) -> None:
    seen = [i ^ 32 for i in range(64)]
    seen = [seen[i] + seen[i ^ 1] + (i ^ 32) for i in range(64)]
    assert probe.mistake("none") == [seen[i] + seen[i ^ 1] for i in range(64)]
