"""Single ops against their peers and against what memory and arithmetic allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from bench.contestant import Entry, Ready
from bench.machine import Machine
from bench.op_case import WIDTHS, Inputs, OpCase, to_double
from bench.op_peers import OpPeer, peers_of
from bench.ops import OPS, facts_of
from bench.session import Session
from bench.sources import sources_of_op
from bench.timing import Call, Limits, race_kernels
from bench.workloads import Workload
from encoder_fast.parity import ParityRow, compare

SUITE = "kernels"

# Bytes of inputs that a pass goes over: more than the last cache holds, so that each call reads
# memory. A CPU's share of its cache is guessed generously.
_CPU_CACHE = 64 * 2**20
_MOST_SETS = 32


def run(session: Session) -> None:
    session.roofs()
    session.begin(SUITE)
    limits = {
        "cpu": Limits(most=30, fewest=3, seconds=0.5 if session.quick else 1.2),
        "gpu": Limits(most=50, fewest=10, seconds=0.3),
        "fake": Limits(most=1, fewest=1, seconds=1),
    }[session.machine.kind]
    for case in grid(session.machine, session.quick):
        if not session.turn(SUITE, case.name, facts_of(case)):
            continue
        torch.manual_seed(0)
        sets = input_sets(session.machine, case)
        with torch.inference_mode():
            entries = list(_entries(session.machine, case, sets))
            session.hold(SUITE, case.name, facts_of(case), entries, race_kernels, limits)


def grid(machine: Machine, quick: bool) -> Iterator[OpCase]:
    """The cases, those that matter most first: what time cuts off is the tail."""
    if machine.is_fake:
        for op in OPS:
            yield OpCase(op, WIDTHS["tiny"], Workload("half", 3, 17), torch.float32)
        return
    first = machine.dtypes[0]
    if machine.is_gpu:
        batches = [Workload("half", 64, 512), Workload("full", 128, 128)]
        # 16,384 tokens each, or nearly so
        shapes = ((256, 64), (64, 256), (43, 384), (32, 512), (16, 1024), (8, 2048))
        more = [Workload("full", *shape) for shape in shapes]
        widths = [WIDTHS["base"], WIDTHS["minilm"], WIDTHS["large"]]
    else:
        batches = [Workload("half", 16, 256), Workload("full", 16, 128)]
        more = [Workload("full", 4, 512), Workload("full", 32, 32)]
        widths = [WIDTHS["base"], WIDTHS["minilm"]]
    dtypes = machine.dtypes[:2] if machine.is_gpu else machine.dtypes
    for dtype, width, workload, op in product(dtypes, widths, batches, OPS):
        # One batch is enough for what only counts tokens, and one dtype of two that are alike.
        if op != "attention" and workload is not batches[0]:
            continue
        if machine.is_gpu and dtype is not first and (op != "attention" or width is not widths[0]):
            continue
        if not quick or width is widths[0]:
            yield OpCase(op, width, workload, dtype)
    if not quick:
        for workload, width in product(more, widths[:2]):
            yield OpCase("attention", width, workload, first)


def input_sets(machine: Machine, case: OpCase) -> list[Inputs]:
    """As many sets of inputs as it takes to overrun the cache."""
    if machine.is_fake:
        wanted = 1
    elif machine.is_gpu:
        cache = torch.cuda.get_device_properties(machine.device).L2_cache_size
        wanted = 4 * cache // OPS[case.op].moved(case) + 1
    else:
        wanted = _CPU_CACHE // OPS[case.op].moved(case) + 1
    return [
        OPS[case.op].inputs(case, machine.device) for _ in range(max(1, min(_MOST_SETS, wanted)))
    ]


def _entries(machine: Machine, case: OpCase, sets: Sequence[Inputs]) -> Iterator[Entry]:
    op = OPS[case.op]
    original, exact = op.eager(sets[0]), op.eager(to_double(sets[0]))

    def check(output: Tensor) -> ParityRow:
        return compare(case.op, output, original, exact)

    def ours(backend: str) -> Ready:
        calls = [op.ours(inputs, backend) for inputs in sets]
        return Ready(calls, check(calls[0]()))

    def theirs(peer: OpPeer) -> Ready:
        prepared = peer.prepare(machine, case, sets)
        calls: Sequence[Call] = prepared.calls
        return Ready(calls, check(prepared.pack(calls[0]())))

    for backend in machine.backends:
        yield Entry(
            f"encoder_fast {backend}",
            lambda backend=backend: ours(backend),
            sources=sources_of_op(case.op, backend),
        )
    for peer in peers_of(case.op, machine):
        yield Entry(peer.label, lambda peer=peer: theirs(peer), compiles=peer.compiles)
