"""How time is taken: the one place for it.

All contestants of a race run in turn, round after round (A B C, A B C, …), so that a machine that
is busy for a moment is busy for all of them. A sample is the time of one pass over a contestant's
calls, divided by their number; the calls differ in their inputs, which together are larger than
the cache, so that none of them finds its data there.

On a CPU the clock is ``perf_counter``. On a GPU kernels are captured into a CUDA graph, and events
around its replay leave the time of launching out; what can't be captured is timed by events alone.
Whole models are timed by the wall clock with a wait at the end, as a caller sees them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.machine import Machine

Call = Callable[[], Any]

# Seconds for the threads of the contestant before to fall asleep.
_PAUSE = 0.02

# Seconds of a call that a cache full of another's weights could still change much.
_SHORT = 0.1


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a race may take: the most and the fewest rounds, and the seconds for all of them."""

    most: int
    fewest: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Times:
    """The samples of one contestant, in seconds a call, and the clock that took them."""

    samples: tuple[float, ...]
    clock: str = "wall"

    def quantile(self, share: float) -> float:
        return quantile(self.samples, share)

    def summary(self) -> dict[str, float | int]:
        shares = {"p20": 0.2, "p50": 0.5, "p80": 0.8, "p99": 0.99}
        rounded = {name: _significant(self.quantile(share)) for name, share in shares.items()}
        return {**rounded, "n": len(self.samples)}


def quantile(samples: Sequence[float], share: float) -> float:
    """Between the two nearest samples, in proportion."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


def race_models(machine: Machine, calls: Mapping[str, Call], limits: Limits) -> dict[str, Times]:
    """Whole forwards by the wall clock, each waited for."""
    passes = {label: _walled(machine, [call]) for label, call in calls.items()}
    if machine.kind == "cpu":
        latest: dict[str, float] = {}
        passes = {label: _settled(label, once, latest) for label, once in passes.items()}
    return {label: Times(samples) for label, samples in _in_turn(passes, limits).items()}


def race_kernels(
    machine: Machine, calls: Mapping[str, Sequence[Call]], limits: Limits
) -> dict[str, Times]:
    """Single ops: on a GPU without the time of launching them."""
    passes, clocks = {}, {}
    for label, own in calls.items():
        passes[label], clocks[label] = _walled(machine, own), "wall"
        if machine.is_gpu:
            passes[label], clocks[label] = _on_gpu(own)
    return {
        label: Times(samples, clocks[label]) for label, samples in _in_turn(passes, limits).items()
    }


def _in_turn(
    passes: Mapping[str, Callable[[], float]], limits: Limits
) -> dict[str, tuple[float, ...]]:
    samples: dict[str, list[float]] = {label: [] for label in passes}
    for once in passes.values():
        once()
    deadline = time.perf_counter() + limits.seconds
    for done in range(limits.most):
        if done >= limits.fewest and time.perf_counter() > deadline:
            break
        for label, once in passes.items():
            samples[label].append(once())
    return {label: tuple(map(_significant, values)) for label, values in samples.items()}


def _walled(machine: Machine, calls: Sequence[Call]) -> Callable[[], float]:
    def once() -> float:
        machine.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        machine.synchronize()
        return (time.perf_counter() - start) / len(calls)

    return once


def _settled(
    label: str, once: Callable[[], float], latest: dict[str, float]
) -> Callable[[], float]:
    """After a pause; where one of the race has short calls, the second of two.

    The threads of ONNX Runtime and OpenVINO go on spinning for a while after their call, on the
    cores of whoever comes next: behind them a call of 13 ms took 30.
    """

    def settled() -> float:
        time.sleep(_PAUSE)
        if min(latest.values(), default=0.0) < _SHORT:
            once()
        latest[label] = once()
        return latest[label]

    return settled


def _on_gpu(calls: Sequence[Call]) -> tuple[Callable[[], float], str]:
    replay = capture(calls)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run_all() -> None:
        for call in calls:
            call()

    run = replay or run_all

    def once() -> float:
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)

    return once, "cuda graph" if replay else "cuda events"


def capture(calls: Sequence[Call]) -> Callable[[], None] | None:
    """All calls as one CUDA graph; ``None`` where one of them can't be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay
