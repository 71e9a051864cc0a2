"""One text and eight at a time: how long a caller waits, and how much of that is not computing."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.contestant import Entry, Ready
from bench.machine import Machine
from bench.model_peers import EAGER, GRAPHS, OURS, SDPA, Forward, ModelPeer, contestants
from bench.models import SIZES, ModelCase, inputs_of
from bench.session import Session
from bench.suites.models import Check
from bench.timing import Call, Limits, race_models
from bench.workloads import Workload

SUITE = "latency"


def run(session: Session) -> None:
    session.begin(SUITE)
    limits = {
        "cpu": Limits(most=100, fewest=5, seconds=2 if session.quick else 5),
        "gpu": Limits(most=200, fewest=100, seconds=1.5),
        "fake": Limits(most=1, fewest=1, seconds=1),
    }[session.machine.kind]
    # Everybody here takes any shape, so that each is built once for all of a model's cases.
    built: dict[tuple[str, str], Forward] = {}
    for case in grid(session.machine, session.quick):
        name = case.name(session.machine)
        if session.turn(SUITE, name, case.facts(session.machine)):
            with torch.inference_mode():
                hold(session, case, name, limits, built)


def grid(machine: Machine, quick: bool) -> Iterator[ModelCase]:
    if machine.is_fake:
        yield ModelCase(SIZES["BERT-base"], Workload("full", 1, 16), torch.float32)
        return
    lengths = (16, 128) if quick else (16, 32, 64, 128, 256, 512)
    names = ("BERT-base", "MiniLM-L6") if machine.is_gpu and not quick else ("MiniLM-L6",)
    for name in names:
        for count in (1, 8):
            for length in lengths:
                workload = Workload("full", count, length)
                yield ModelCase(SIZES[name], workload, machine.dtypes[0], exported=True)


def hold(
    session: Session,
    case: ModelCase,
    name: str,
    limits: Limits,
    built: dict[tuple[str, str], Forward],
) -> None:
    machine = session.machine
    inputs = inputs_of(case, machine)
    check = Check(machine, case, inputs)

    def prepare(peer: ModelPeer) -> Ready:
        key = (peer.label, case.title(machine))
        if key not in built:
            built[key] = peer.build(machine, case, inputs)
        forward = built[key]
        return Ready([lambda: forward(inputs)], check(forward(inputs)))

    def outside(label: str, ready: Ready) -> dict[str, float | None]:
        seen = label in (OURS, GRAPHS, SDPA, EAGER)
        return {"outside_kernels": share_outside(machine, ready.calls[0]) if seen else None}

    entries = [
        Entry(peer.label, lambda peer=peer: prepare(peer), peer.sources)
        for peer in contestants(machine, case)
    ]
    session.hold(
        SUITE,
        name,
        case.facts(machine),
        entries,
        lambda machine, calls, limits: race_models(
            machine, {label: own[0] for label, own in calls.items()}, limits
        ),
        limits,
        outside,
    )


def share_outside(machine: Machine, call: Call, calls: int = 5) -> float | None:
    """The share of a call's time in which no kernel runs (GPU), or no PyTorch operation (CPU).

    By PyTorch's profiler, over some calls one after another; on a GPU each is waited for.
    """
    import time

    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CUDA if machine.is_gpu else ProfilerActivity.CPU]
    start = time.perf_counter()
    for _ in range(calls):
        call()
        machine.synchronize()
    plain = time.perf_counter() - start
    with profile(activities=kinds) as profiler:
        start = time.perf_counter()
        for _ in range(calls):
            call()
            machine.synchronize()
        watched = time.perf_counter() - start
    averages = profiler.key_averages()
    if machine.is_gpu:
        busy, whole = sum(a.self_device_time_total for a in averages) / 1e6, plain
        if not busy:
            return None  # the profiler saw no kernel: it may not read the GPU here
    else:
        # The profiler slows operations and the gaps between them alike.
        busy, whole = sum(a.self_cpu_time_total for a in averages) / 1e6, watched
    return round(min(1.0, max(0.0, 1 - busy / whole)), 3)
