"""What the blocks of a launch do to each other, in the emulation of CUDA's execution model.

Blocks run side by side here: in random order, interrupted at accesses to global memory and at
atomics. A seed stands for one such order, is part of each failing test's name and of the
emulation's messages, and gives the same order again. `ENCODER_FAST_TEST_SEEDS=100` runs a hundred
of them instead of three.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from types import ModuleType

import cuda_host_build
import pytest
import torch
from attention_oracle import random_qkv
from kernel_backends import DEVICE
from test_cuda_attention import assert_as_good_as_eager
from torch import Tensor

from encoder_fast.backends import load

reason = cuda_host_build.why_not()
if reason is None and DEVICE != "cpu":
    reason = "the emulation is for tests without a GPU"
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

SEEDS = range(int(os.environ.get("ENCODER_FAST_TEST_SEEDS", "3")))


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    return cuda_host_build.build_probe()


def ordered(module: ModuleType, seed: int | None) -> Iterator[int | None]:
    if seed is not None:
        module.interleave(seed)
    yield seed
    module.run_in_order()


@pytest.fixture(params=[None, *SEEDS], ids=lambda seed: "in-order" if seed is None else f"{seed}")
def any_order(request: pytest.FixtureRequest, probe: ModuleType) -> Iterator[int | None]:
    yield from ordered(probe, request.param)


@pytest.fixture(params=SEEDS)
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The backend `cuda-host`, its blocks interleaved."""
    extension = cuda_host_build.build_backend()
    for _ in ordered(extension, request.param):
        yield load("cuda-host")


def test_atomics_count(probe: ModuleType, any_order: int | None) -> None:
    total, *marks = probe.count(True, 8)
    assert total == len(marks) == 8 * 64
    assert sorted(marks) == sorted(list(range(8)) * 64), "each thread has a number of its own"


def test_what_is_not_atomic_is_caught(probe: ModuleType, any_order: int | None) -> None:
    with pytest.raises(probe.EmulationError, match=r"has (written|read), and no barrier orders"):
        probe.count(False, 8)


def test_a_seed_is_an_order(probe: ModuleType) -> None:
    in_order = probe.count(True, 8)
    marks = {}
    for seed in range(8):
        for _ in ordered(probe, seed):
            marks[seed] = tuple(probe.count(True, 8))
            assert tuple(probe.count(True, 8)) == marks[seed]
    assert len({*marks.values(), tuple(in_order)}) == 9
    # The last thread of some block comes before the first of another, and the other way round.
    assert any(a < b for a, b in itertools.pairwise(marks[0][1:]))
    assert any(a > b for a, b in itertools.pairwise(marks[0][1:]))


# What the emulation says, and whether it does where blocks run in order too.
CONFLICTS = {
    "both write": ("store to what block .* has written", True),
    "write, then read": ("(load of what .* has written|store to what .* has read)", True),
    "read, then write": ("(load of what .* has written|store to what .* has read)", False),
    "write, then copy": ("(load of what .* has written|store to what .* has read)", True),
    "write, then add": ("store to what block .* has written", True),
    "write, then read only": ("load through the read-only path of what block", True),
    "read only, then write": ("store to what block .* has loaded through the read-only", False),
    "threads without a barrier": ("store to what block 0, thread .* has written", True),
}


def test_every_conflict_is_listed(probe: ModuleType) -> None:
    assert set(probe.conflicts()) == {*CONFLICTS, "none"}


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_conflicts_are_caught(probe: ModuleType, any_order: int | None, conflict: str) -> None:
    message, in_order_too = CONFLICTS[conflict]
    if any_order is None and not in_order_too:
        pytest.skip("reads are noted only where blocks are interleaved")
    if any_order is not None:
        message = rf"interleaved by seed {any_order}\), block \d, thread \d+: {message}"
    with pytest.raises(probe.EmulationError, match=message):
        probe.conflict(conflict)


def test_what_is_no_conflict(probe: ModuleType, any_order: int | None) -> None:
    # The halves of a word by two blocks, a word of its own each, and an atomic sum of both.
    assert probe.conflict("none") == [0x20001] * 64 + [5, 5, 10]


def listed(lengths: list[int], count: int | None = None, counter: int = 0) -> list[int]:
    """A list of one-row tiles; a length of 0 is an item without rows."""
    entries = [[begin, length, 0, 0] for begin, length in enumerate(lengths)]
    header = [len(lengths) if count is None else count, counter, 0, 0]
    return [word % 2**32 for words in (header, *entries) for word in words]


NOBODY = 0xDEADBEEF


def test_items_without_rows_are_passed_over(probe: ModuleType, any_order: int | None) -> None:
    # At the front, so that a block begins with one, in a row, and at the end.
    lengths = [0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, *[1, 0] * 20, 0]
    marks = probe.items(listed(lengths), 4, len(lengths), False, 0)
    assert [mark != NOBODY for mark in marks] == [length > 0 for length in lengths]
    assert set(marks) <= {0, 1, 2, 3, NOBODY}


@pytest.mark.parametrize("spoiled", (-(2**31), -1, 0, 1, 2**31 - 1))
def test_a_spoiled_slot_ends_a_block(
    probe: ModuleType, any_order: int | None, spoiled: int
) -> None:
    # 1 is that block's own first item. The others take what there is, but for what it has taken.
    marks = probe.items(listed([1] * 40), 4, 40, True, spoiled)
    assert marks[1] == 1
    assert marks.count(NOBODY) <= 1
    assert marks.count(1) == 1


@pytest.mark.parametrize("counter", (-(2**31), -40, 2**31 - 1))
def test_a_spoiled_counter_ends_a_block(
    probe: ModuleType, any_order: int | None, counter: int
) -> None:
    marks = probe.items(listed([1] * 40, counter=counter), 4, 40, False, 0)
    assert marks == [0, 1, 2, 3, *[NOBODY] * 36]


@pytest.mark.parametrize("count", (41, 2**31 - 1, -1))
def test_a_spoiled_count_reads_nothing_beyond_the_list(probe: ModuleType, count: int) -> None:
    marks = probe.items(listed([1] * 40, count=count), 4, 40, False, 0)
    assert [mark != NOBODY for mark in marks] == [count > 0] * 40


# Tiles from the list, of two classes; more items than blocks that are resident together.
LISTED = {
    "up-to-128": ((100, *[3] * 30, *[0] * 5, 65), 1, 128),
    "longer": ((300, 129, *[2, 0] * 20, 257), 1, 32),
}
# The regular grid: a warp an item, one tile, and a loop; with a tail to clear.
REGULAR = {
    "up-to-32": ((0, 1, 17, 32, 0, 5), 3, 32),
    "up-to-64": ((63, 1, 0, 64), 2, 64),
    "loop": ((257, 0, 100), 1, 64),
}


@pytest.mark.parametrize("case", (LISTED | REGULAR).values(), ids=[*LISTED, *REGULAR])
def test_attention(kernels: ModuleType, case: tuple[tuple[int, ...], int, int]) -> None:
    lengths, heads, head_dim = case
    q, k, v = random_qkv(sum(lengths), 5, heads, head_dim, torch.float16).unbind(1)
    assert_as_good_as_eager(kernels, q, k, v, lengths)


# A warp a row, half of one, a block a row, and single elements.
@pytest.mark.parametrize("width", (96, 384, 1536, 100))
def test_norms(kernels: ModuleType, width: int) -> None:
    x, residual = torch.randn(2, 40, width).half().unbind(0)
    weight, bias = torch.randn(2, width).unbind(0)
    arguments = (weight, bias, 1e-12, None)
    out, total = kernels.add_layer_norm_sum(x, residual, *arguments)
    in_order = one_after_another(lambda: kernels.add_layer_norm_sum(x, residual, *arguments))
    assert torch.equal(out, in_order[0]) and torch.equal(total, in_order[1])

    ids = torch.randint(0, 40, (50,))
    arguments = (ids, ids, None, x, residual, None, weight, bias, 1e-12)
    embedded = kernels.embed_layer_norm(*arguments)
    assert torch.equal(embedded, one_after_another(lambda: kernels.embed_layer_norm(*arguments)))


def test_gelu_in_place(kernels: ModuleType) -> None:
    x, weight, bias = (
        torch.randn(9, 8).half(),
        torch.randn(2100, 8).half(),
        torch.randn(2100).half(),
    )
    out = kernels.linear(x, weight, bias, "gelu")
    in_order = one_after_another(lambda: kernels.linear(x, weight, bias, "gelu"))
    assert torch.equal(out, in_order)


def one_after_another(call):
    cuda_host_build.build_backend().run_in_order()
    return call()


def spoil_list(monkeypatch: pytest.MonkeyPatch, spoil) -> None:
    """Calls `spoil(rows of the list)` between the kernel that writes it and the one that reads."""
    extension = cuda_host_build.build_backend()
    workspaces: list[Tensor] = []
    empty = torch.empty

    def watched(*size: object, **options: object) -> Tensor:
        tensor = empty(*size, **options)  # type: ignore[call-overload]
        if options.get("dtype") == torch.uint8:
            workspaces.append(tensor)
        return tensor

    def observer(kernel: str) -> None:
        if kernel.startswith("list of tiles"):
            spoil(workspaces[-1].view(torch.int32).view(-1, 4))

    monkeypatch.setattr(torch, "empty", watched)
    extension.observe_launches(observer)


@pytest.fixture
def _nobody_watches() -> Iterator[None]:
    yield
    cuda_host_build.build_backend().observe_launches(None)


@pytest.mark.usefixtures("_nobody_watches")
@pytest.mark.parametrize("case", LISTED.values(), ids=LISTED)
def test_attention_passes_over_items_without_rows(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, case: tuple[tuple[int, ...], int, int]
) -> None:
    lengths, heads, head_dim = case

    def insert_empty_tiles(rows: Tensor) -> None:
        n = int(rows[0, 0])
        tiles = rows[1 : n + 1].clone()
        empty = torch.tensor([[5, 0, 0, 0], [0, 128, 128, 0]], dtype=torch.int32)
        # First of all, twice in a row, and last.
        tiles = torch.cat([empty[:1], tiles[:3], empty, tiles[3:], empty[1:]])
        assert len(tiles) < len(rows), "the list has room"
        rows[1 : len(tiles) + 1] = tiles
        rows[0, 0] = len(tiles)

    spoil_list(monkeypatch, insert_empty_tiles)
    q, k, v = random_qkv(sum(lengths), 0, heads, head_dim, torch.float16).unbind(1)
    assert_as_good_as_eager(kernels, q, k, v, lengths)


# Negative, falling and beyond the last token, but no row is of two sequences or of the tail too.
NONSENSE = {
    "negative": (-5, -(2**31), 100, 400),
    "falling": (350, 100, 50, 400),
    "beyond": (0, 100, 2**31 - 1, 2**31 - 1, 2**30, 400),
}
# More tiles than the list has room for, and a tail that begins before the first row.
OVERLAPPING = {"sequences": (0, *[400, 0] * 12, 400), "tail": (0, 100, -7)}


def attend_to_nonsense(ends: tuple[int, ...], longest: int) -> None:
    q, k, v = random_qkv(400, 0, 1, 32, torch.float16).unbind(1)
    load("cuda-host").attention(q, k, v, torch.tensor(ends, dtype=torch.int32), longest, 32**-0.5)


# The two classes of short sequences, and tiles from the list.
@pytest.mark.parametrize("longest", (30, 100, 300), ids=lambda longest: f"max{longest}")
@pytest.mark.parametrize("ends", NONSENSE.values(), ids=NONSENSE)
def test_sequences_that_are_none_stay_within_the_operands(
    ends: tuple[int, ...], longest: int
) -> None:
    """Nobody checks cu_seqlens on the device: no loop may run for long, and no access go astray."""
    attend_to_nonsense(ends, longest)


@pytest.mark.parametrize("longest", (30, 100, 300), ids=lambda longest: f"max{longest}")
@pytest.mark.parametrize("ends", OVERLAPPING.values(), ids=OVERLAPPING)
def test_sequences_that_overlap_are_a_conflict_and_nothing_worse(
    ends: tuple[int, ...], longest: int
) -> None:
    error = cuda_host_build.build_backend().EmulationError
    with pytest.raises(error, match=r"attention of .* has written, and no barrier orders them"):
        attend_to_nonsense(ends, longest)
