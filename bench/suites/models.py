"""Whole models over batches of texts, against every other way to run them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.contestant import Entry, Ready
from bench.machine import Machine
from bench.memory import peak_memory
from bench.model_peers import ModelPeer, contestants
from bench.models import SIZES, ModelCase, build, inputs_of
from bench.session import Session
from bench.timing import Limits, race_models
from bench.workloads import Workload
from encoder_fast.parity import ParityRow, compare

SUITE = "models"

# Rows of the batch on which numbers are compared: a float64 run of all of them takes too long.
_CHECKED_ROWS = 3

# Of torch.compile; the second one's search takes minutes on a GPU.
_MODES = ("default", "max-autotune")


def run(session: Session) -> None:
    session.begin(SUITE)
    limits = {
        "cpu": Limits(most=15, fewest=3, seconds=3 if session.quick else 8),
        "gpu": Limits(most=40, fewest=5, seconds=1.0),
        "fake": Limits(most=1, fewest=1, seconds=1),
    }[session.machine.kind]
    for case in grid(session.machine, session.quick):
        name = case.name(session.machine)
        if session.turn(SUITE, name, case.facts(session.machine)):
            with torch.inference_mode():
                hold(session, case, name, limits)


def hold(session: Session, case: ModelCase, name: str, limits: Limits) -> None:
    machine = session.machine
    inputs = inputs_of(case, machine)
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
    """The parity rule on some texts of a batch.

    The original and the reference run each of them alone and without padding, so that nothing can
    go wrong with a mask there: in float64 transformers' eager ModernBERT gives NaN for padding.
    """

    def __init__(self, machine: Machine, case: ModelCase, inputs: Mapping[str, Tensor]) -> None:
        self._machine, self._case, self._inputs = machine, case, inputs
        # The longest, the shortest and others between: what padding does wrong, it does there.
        order = sorted(range(case.workload.batch), key=lambda row: case.workload.lengths[row])
        last, count = len(order) - 1, min(_CHECKED_ROWS, len(order))
        self._rows = [order[last * i // max(1, count - 1)] for i in range(count)]
        self._original: Tensor | None = None
        self._exact: Tensor | None = None

    def __call__(self, output: Tensor) -> ParityRow:
        if self._original is None or self._exact is None:
            model = build(self._case, self._machine, "eager")
            self._original = self._alone(model)
            self._exact = self._alone(model.double())
        lengths = self._case.workload.lengths
        ours = torch.cat([output[row, : lengths[row]] for row in self._rows])
        ours = ours.to(self._exact.device)
        return compare("last_hidden_state", ours, self._original, self._exact)

    def _alone(self, model: Any) -> Tensor:
        lengths = self._case.workload.lengths
        parts = []
        for row in self._rows:
            text = {k: v[row : row + 1, : lengths[row]] for k, v in self._inputs.items()}
            parts.append(model(**text).last_hidden_state[0])
        return torch.cat(parts)


def grid(machine: Machine, quick: bool) -> Iterator[ModelCase]:
    """The cases, those that matter most first: what time cuts off is the tail."""
    if machine.is_fake:
        for size in SIZES.values():
            yield ModelCase(size, Workload("half", 2, 9), torch.float32, compiled=_MODES)
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
        yield ModelCase(size, half, first, compiled=_MODES, exported=True)
    for size, dtype in product((small, base), others):
        yield ModelCase(size, half, dtype, exported=True)
    for size, dtype in product((small, base), machine.dtypes):
        yield ModelCase(size, full, dtype, exported=True)
    rarer = [
        *(SIZES[name] for name in ("ELECTRA-base", "ALBERT-base", "DeBERTa-base")),
        *(SIZES[name] for name in ("XLM-RoBERTa-XL", "XLM-RoBERTa-base", "CamemBERT-base")),
    ]
    family = [size for size in SIZES.values() if size not in (small, base, large, *rarer)]
    for size in family:
        yield ModelCase(size, half, first, exported=size.sdpa)
    for dtype in machine.dtypes:
        yield ModelCase(large, Workload("squad", 8, 384), dtype, exported=True)
    for size, dtype in product(family, others):
        yield ModelCase(size, half, dtype)
    for shape in ((64, 32), (4, 512)):
        yield ModelCase(small, Workload("half", *shape), first, exported=True)
    for size in rarer:
        yield ModelCase(size, half, first)


def _gpu_grid(quick: bool) -> Iterator[ModelCase]:
    small, base, large = (SIZES[name] for name in ("MiniLM-L6", "BERT-base", "BERT-large"))
    deberta = SIZES["DeBERTa-v3-base"]
    half, full = Workload("half", 64, 256), Workload("full", 64, 256)
    squad = Workload("squad", 64, 384)
    fp16, bf16 = torch.float16, torch.bfloat16
    modes = _MODES[:1] if quick else _MODES
    yield ModelCase(base, half, fp16, compiled=modes)
    yield ModelCase(small, half, fp16, compiled=modes)
    # Its attention runs in CUDA C++ by prediction: is that faster than Triton?
    yield ModelCase(deberta, half, fp16)
    yield ModelCase(base, full, fp16)
    if quick:
        return
    yield ModelCase(large, squad, fp16, compiled=_MODES)
    for size in SIZES.values():
        if size not in (small, base, large, deberta):
            yield ModelCase(size, half, fp16)
    for shape in ((512, 32), (128, 128), (32, 512)):
        for kind in ("half", "full"):
            yield ModelCase(base, Workload(kind, *shape), fp16)
    for size in (base, SIZES["ModernBERT-base"], deberta):
        yield ModelCase(size, half, bf16)
