"""Whole models over batches of texts, against every other way to run them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import Tensor

from bench.contestant import Entry, Ready
from bench.machine import Machine
from bench.memory import peak_memory
from bench.model_peers import ModelPeer, contestants
from bench.models import SIZES, ModelCase, batch, build
from bench.session import Session
from bench.timing import Limits, race_models
from bench.workloads import Workload
from encoder_fast.parity import ParityRow, compare

SUITE = "models"

# Rows of the batch on which numbers are compared: a float64 run of all of them takes too long.
_CHECKED_ROWS = 3


def run(session: Session) -> None:
    session.begin(SUITE)
    limits = {
        "cpu": Limits(most=15, fewest=3, seconds=3 if session.quick else 8),
        "gpu": Limits(most=40, fewest=5, seconds=1.0),
        "fake": Limits(most=1, fewest=1, seconds=1),
    }[session.machine.kind]
    for case in grid(session.machine, session.quick):
        name = case.name(session.machine)
        if session.wants(f"{SUITE} {name}"):
            with torch.inference_mode():
                hold(session, case, name, limits)


def hold(session: Session, case: ModelCase, name: str, limits: Limits) -> None:
    machine = session.machine
    inputs = batch(case, machine)
    check = Check(machine, case, inputs)

    def prepare(peer: ModelPeer) -> Ready:
        with peak_memory(machine) as peak:
            forward = peer.build(machine, case, inputs)
            output = forward(inputs)
        return Ready([lambda: forward(inputs)], check(output), peak.added_bytes)

    entries = [
        Entry(peer.label, lambda peer=peer: prepare(peer), peer.sources, peer.compiles)
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
    )


class Check:
    """The parity rule on some rows of a batch, over their real tokens."""

    def __init__(self, machine: Machine, case: ModelCase, inputs: Mapping[str, Tensor]) -> None:
        lengths = torch.tensor(case.workload.lengths)
        # The longest, the shortest and others between: what padding does wrong, it does there.
        order = lengths.argsort(descending=True)
        steps = torch.linspace(0, len(order) - 1, min(_CHECKED_ROWS, len(order))).long()
        self._rows = order[steps].to(machine.device)
        part = {name: value[self._rows] for name, value in inputs.items()}
        self._valid = part["attention_mask"].bool()
        self._original: Tensor | None = None
        self._exact: Tensor | None = None
        self._compute = lambda: _original_and_exact(machine, case, part)

    def __call__(self, output: Tensor) -> ParityRow:
        if self._original is None or self._exact is None:
            self._original, self._exact = self._compute()
        ours = output[self._rows.to(output.device)].to(self._exact.device)
        return compare("last_hidden_state", ours, self._original, self._exact, self._valid)


def _original_and_exact(
    machine: Machine, case: ModelCase, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    model = build(case, machine, "eager")
    original = model(**inputs).last_hidden_state
    return original, model.double()(**inputs).last_hidden_state


def grid(machine: Machine, quick: bool) -> Iterator[ModelCase]:
    """The cases, those that matter most first: what time cuts off is the tail."""
    if machine.is_fake:
        for size in SIZES.values():
            yield ModelCase(size, Workload("half", 2, 9), torch.float32, compiled=True)
    elif machine.is_gpu:
        yield from _gpu_grid(quick)
    else:
        yield from _cpu_grid(machine, quick)


def _cpu_grid(machine: Machine, quick: bool) -> Iterator[ModelCase]:
    small, base, large = (SIZES[name] for name in ("MiniLM-L6", "BERT-base", "BERT-large"))
    half, full = Workload("half", 16, 128), Workload("full", 16, 128)
    first, *others = machine.dtypes
    if quick:
        yield ModelCase(small, half, first, exported=True)
        for dtype in machine.dtypes:
            yield ModelCase(base, half, dtype)
        return
    for size in (small, base):
        yield ModelCase(size, half, first, compiled=True, exported=True)
    for size, dtype in product((small, base), others):
        yield ModelCase(size, half, dtype, exported=True)
    for size, dtype in product((small, base), machine.dtypes):
        yield ModelCase(size, full, dtype, exported=True)
    family = [size for size in SIZES.values() if size not in (small, base, large)]
    for size in family:
        yield ModelCase(size, half, first, exported=size.sdpa)
    for dtype in machine.dtypes:
        yield ModelCase(large, Workload("squad", 8, 384), dtype, exported=True)
    for size, dtype in product(family, others):
        yield ModelCase(size, half, dtype)
    for shape in ((64, 32), (4, 512)):
        yield ModelCase(small, Workload("half", *shape), first, exported=True)


def _gpu_grid(quick: bool) -> Iterator[ModelCase]:
    small, base, large = (SIZES[name] for name in ("MiniLM-L6", "BERT-base", "BERT-large"))
    half, full = Workload("half", 64, 256), Workload("full", 64, 256)
    squad = Workload("squad", 64, 384)
    fp16, bf16 = torch.float16, torch.bfloat16
    if quick:
        yield ModelCase(base, half, fp16)
        yield ModelCase(large, squad, fp16)
        yield ModelCase(small, half, fp16)
        return
    yield ModelCase(base, half, fp16, compiled=True)
    yield ModelCase(large, squad, fp16)
    yield ModelCase(base, full, fp16)
    for size in SIZES.values():
        if size not in (base, large):
            yield ModelCase(size, half, fp16)
    for shape in ((512, 32), (128, 128), (32, 512)):
        for kind in ("half", "full"):
            yield ModelCase(base, Workload(kind, *shape), fp16)
    for size in (base, SIZES["ModernBERT-base"], SIZES["DeBERTa-v3-base"]):
        yield ModelCase(size, half, bf16)
    yield ModelCase(large, squad, fp16, compiled=True)
