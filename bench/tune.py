"""The search for launch configurations: offline, once a card; its result is what launchers read.

For each shape class every candidate runs the same inputs, is checked for parity and then timed in
turn with the others. The winner is written to ``kernels/launch_table.json`` if it beats the
launcher's own choice by more than noise; otherwise the class stays out of the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.compile_ahead import Job, compile_ahead
from bench.contestant import first_line
from bench.machine import Machine
from bench.op_case import WIDTHS, OpCase, to_double
from bench.ops import OPS
from bench.suites.kernels import input_sets
from bench.timing import Call, Limits, race_kernels
from bench.workloads import Workload
from encoder_fast.parity import compare

# A winner has to be faster by this share of the time: what the table holds should not change with
# every run of the search.
LEAST_GAIN = 0.03

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Target:
    """One shape class of one kernel: the case that stands for it, and what may be tried."""

    kernel: str
    shape_class: str
    case: OpCase
    candidates: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome for a target: seconds by candidate, and why others did not run."""

    target: Target
    seconds: dict[str, float]
    refused: dict[str, str]

    @property
    def winner(self) -> dict[str, Any] | None:
        """The configuration to write; ``None`` where the launcher's own is as good."""
        best = min(self.seconds, key=self.seconds.__getitem__)
        own = self.seconds.get(DEFAULT)
        if best == DEFAULT or (own is not None and self.seconds[best] > own * (1 - LEAST_GAIN)):
            return None
        return next(c for c in self.target.candidates if name_of(c) == best)


def name_of(config: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in config.items())


def targets(machine: Machine) -> Iterator[Target]:
    """Every shape class that encoders at large have."""
    yield from _norm_targets(machine)
    yield from _attention_targets(machine)


def _norm_targets(machine: Machine) -> Iterator[Target]:
    from encoder_fast.kernels.row_norm import row_class, row_tile

    if machine.is_fake:
        widths, batch, dtypes = ["tiny"], Workload("half", 3, 17), [torch.float32]
        lanes, warps = (4, 8), (4,)
    else:
        widths, batch = ["minilm", "base"], Workload("half", 128, 256)
        dtypes = [torch.float16, torch.float32]
        lanes, warps = (8, 16, 32, 64, 128), (2, 4, 8)
    for kernel, width, dtype in product(("add_layer_norm", "embed_layer_norm"), widths, dtypes):
        case = OpCase(kernel, WIDTHS[width], batch, dtype)
        hidden = case.width.hidden
        own = row_tile(hidden)
        candidates = tuple(
            {"lanes": lane, "num_warps": warp}
            for lane, warp in product(lanes, warps)
            # a row in at most 16 pieces, a thread with at most 64 columns, no warp without a row
            if hidden / 64 <= lane <= 32 * warp
            and hidden * dtype.itemsize <= lane * 16 * 16
            and (lane, warp) != (own.lanes, own.num_warps)
        )
        yield Target(kernel, row_class(hidden, dtype.itemsize), case, candidates)


def _attention_targets(machine: Machine) -> Iterator[Target]:
    from encoder_fast.kernels.attention import CLASS_LENGTHS, choose_config, shape_class
    from encoder_fast.kernels.attention_tiles import shared_memory

    if machine.is_fake:
        widths, batches, dtypes = ["tiny"], [Workload("full", 1, 40)], [torch.float32]
        tiles, warps, stages = ((16, 16),), (4,), (1,)
    else:
        widths, dtypes = ["minilm", "base"], [torch.float16]
        lengths = (64, 128, *CLASS_LENGTHS)
        batches = [Workload("full", 16384 // length, length) for length in lengths]
        # below the mean length at which the ladder takes larger tiles
        batches.insert(2, Workload("half", 128, 256))
        tiles, warps, stages = tuple(product((64, 128), (32, 64, 128))), (4, 8), (1, 2, 3)
    seen = set()
    for width, dtype, batch in product(widths, dtypes, batches):
        case = OpCase("attention", WIDTHS[width], batch, dtype)
        size, mean = case.width.head_size, batch.tokens // batch.batch
        own = choose_config(size, dtype, batch.longest, mean, shared_memory(machine.device))
        name = shape_class(size, dtype, own, mean)
        if name in seen:
            continue
        seen.add(name)
        candidates = tuple(
            {"block_m": m, "block_n": n, "num_warps": warp, "num_stages": stage}
            for (m, n), warp, stage in product(tiles, warps, stages)
            if (not own.one_key_tile or (n >= own.block_n and stage == 1))
            and (m, n, warp, stage) != (own.block_m, own.block_n, own.num_warps, own.num_stages)
        )
        yield Target("attention", name, case, candidates)


def jobs_of(chosen: Iterable[Target]) -> list[Job]:
    """Every launch of a search, target by target.

    One configuration of two targets may be the same code. So far apart, the second finds it done.
    """
    return [
        Job(target.kernel, target.shape_class, target.case, config)
        for target in chosen
        for config in (None, *target.candidates)
    ]


@torch.inference_mode()
def search(machine: Machine, target: Target, limits: Limits) -> Found:
    """Check and time every candidate of a target, the launcher's own choice among them."""
    from encoder_fast.kernels import launch_table

    op = OPS[target.case.op]
    sets = input_sets(machine, target.case)
    original, exact = op.eager(sets[0]), op.eager(to_double(sets[0]))

    def calls_with(config: dict[str, Any] | None) -> list[Call]:
        plain = [op.ours(inputs, "triton") for inputs in sets]
        if config is None:
            return plain

        def under(call: Call) -> Call:
            def run() -> Any:
                with launch_table.forced(target.kernel, target.shape_class, config):
                    return call()

            return run

        return [under(call) for call in plain]

    ready: dict[str, Sequence[Call]] = {}
    refused: dict[str, str] = {}
    for config in (None, *target.candidates):
        name = DEFAULT if config is None else name_of(config)
        calls = calls_with(config)
        try:
            row = compare(name, calls[0](), original, exact)
        except Exception as error:
            # too many registers or too much shared memory: Triton says so when it compiles
            refused[name] = first_line(error)
            continue
        if row.ok:
            ready[name] = calls
        else:
            refused[name] = f"wrong: error {row.error:.1e}, eager {row.original_error:.1e}"
    times = race_kernels(machine, ready, limits)
    return Found(target, {k: v.quantile(0.5) for k, v in times.items()}, refused)


def write_table(path: Path, card: str, found: Sequence[Found]) -> dict[str, Any]:
    """Put the winners for a card into the table; what else it holds stays."""
    table = json.loads(path.read_text("utf-8")) if path.exists() else {}
    own = table.setdefault(card, {})
    for result in found:
        classes = own.setdefault(result.target.kernel, {})
        classes.pop(result.target.shape_class, None)
        winner = result.winner
        if winner is not None:
            classes[result.target.shape_class] = winner
    table[card] = {kernel: dict(sorted(c.items())) for kernel, c in own.items() if c}
    kept = {name: kernels for name, kernels in sorted(table.items()) if kernels}
    path.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    return kept


def tune(
    machine: Machine,
    path: Path,
    wanted: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> tuple[Found, ...]:
    """Search all targets whose name holds the words of ``wanted``, and write the table.

    The table is written after each target: a search that is stopped keeps what it has found.
    """
    limits = Limits(most=1, fewest=1, seconds=1) if machine.is_fake else Limits(50, 10, 1.0)
    chosen = {f"{target.kernel} {target.shape_class}": target for target in targets(machine)}
    chosen = {k: v for k, v in chosen.items() if all(word in k for word in wanted)}
    if machine.is_gpu:
        compile_ahead(jobs_of(chosen.values()), machine.device)
    found: list[Found] = []
    for name, target in chosen.items():
        result = search(machine, target, limits)
        found.append(result)
        write_table(path, machine.name, found)
        say(f"{name}: {_told(result)}")
    return tuple(found)


def _told(result: Found) -> str:
    own = result.seconds.get(DEFAULT)
    best = min(result.seconds.values())
    chosen = result.winner
    gain = "" if own is None else f", {own * 1e6:.1f} us by default, {best * 1e6:.1f} us at best"
    kept = "default kept" if chosen is None else name_of(chosen)
    return f"{kept}{gain}, {len(result.refused)} of {len(result.target.candidates)} refused"
