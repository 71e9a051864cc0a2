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
    elif machine.is_gpu:
        yield from dict.fromkeys(_gpu_grid(machine, quick))
    else:
        yield from _cpu_grid(machine, quick)


def _cpu_grid(machine: Machine, quick: bool) -> Iterator[OpCase]:
    batches = [Workload("half", 16, 256), Workload("full", 16, 128)]
    widths = [WIDTHS["base"], WIDTHS["minilm"]]
    for dtype, width, workload, op in product(machine.dtypes, widths, batches, OPS):
        # One batch is enough for what only counts tokens.
        if op != "attention" and workload is not batches[0]:
            continue
        if not quick or width is widths[0]:
            yield OpCase(op, width, workload, dtype)
    if not quick:
        for workload, width in product(
            (Workload("full", 4, 512), Workload("full", 32, 32)), widths
        ):
            yield OpCase("attention", width, workload, machine.dtypes[0])


def _gpu_grid(machine: Machine, quick: bool) -> Iterator[OpCase]:
    """Case by case by how much hangs on the answer; some come twice."""
    first, second = machine.dtypes[:2]
    base, minilm, large = (WIDTHS[name] for name in ("base", "minilm", "large"))
    # 16,384 tokens each, or nearly so
    full = {
        longest: Workload("full", 16384 // longest, longest)
        for longest in (512, 256, 128, 1024, 384, 64, 2048)
    }
    half = Workload("half", 64, 512)
    # Does attention reach the library kernels, without padding, where those can run?
    for longest in (512, 256, 128):
        yield OpCase("attention", base, full[longest], first)
    # Is a LayerNorm as fast as a copy?
    for width in (base, minilm, large):
        yield OpCase("add_layer_norm", width, full[256], first)
    yield OpCase("disentangled_attention", base, full[512], first)
    yield OpCase("attention", base, half, first)
    for longest in (512, 256, 128):
        yield OpCase("attention", minilm, full[longest], first)
    for op in OPS:
        yield OpCase(op, base, half, first)
    if quick:
        return
    for longest, width in product(full, (base, minilm)):
        yield OpCase("attention", width, full[longest], first)
    for width, op in product((minilm, large), OPS):
        yield OpCase(op, width, half, first)
    yield OpCase("attention", large, full[128], first)
    for workload in (half, full[512], full[128]):
        yield OpCase("attention", base, workload, second)


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
