"""What an op under test is: its inputs, its work, and its form in plain PyTorch.

Each function of an :class:`Op` takes the inputs of one call. ``eager`` is both the first peer and,
on float64 inputs, the reference that everybody is checked against. All results are packed,
``(total, ...)``; peers in :mod:`bench.op_peers` bring theirs into that form for the check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.roofs import dtype_name
from bench.timing import Call
from bench.workloads import Workload

Inputs = dict[str, Any]
EPS = 1e-12
VOCABULARY = 30522


@dataclass(frozen=True, slots=True)
class Width:
    """The sizes of a model's layer."""

    name: str
    heads: int
    head_size: int
    inner: int

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size


WIDTHS = {
    "minilm": Width("minilm", 12, 32, 1536),
    "base": Width("base", 12, 64, 3072),
    "large": Width("large", 16, 64, 4096),
    # the base width cut into the largest heads
    "wide": Width("wide", 6, 128, 3072),
    "tiny": Width("tiny", 2, 16, 64),
}


@dataclass(frozen=True, slots=True)
class OpCase:
    """One op on one batch in one dtype."""

    op: str
    width: Width
    workload: Workload
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.op} {self.width.name} {self.workload.name} {dtype_name(self.dtype)}"


@dataclass(frozen=True, slots=True)
class Op:
    """An operation.

    Attributes:
        inputs: new random ones for a case on a device.
        ours: our op on a backend by name, as the engine calls it; weights are made ready before.
        eager: plain PyTorch, in the dtype of the inputs.
        eager_races: ``eager`` is how people write the op, and so a peer.
        moved: bytes that have to be read and written, each once.
        operations: floating point operations, a multiplication and an addition counted as two.
    """

    inputs: Callable[[OpCase, torch.device], Inputs]
    ours: Callable[[Inputs, str], Call]
    eager: Callable[[Inputs], Tensor]
    moved: Callable[[OpCase], int]
    operations: Callable[[OpCase], int]
    eager_races: bool = True


def to_double(inputs: Inputs) -> Inputs:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def vectors(case: OpCase, device: torch.device, *names: str) -> Inputs:
    """Weights and biases of the hidden size, as far from 1 and 0 as trained ones are."""
    size = case.width.hidden
    return {
        name: (torch.randn(size, device=device) * 0.1 + (name == "weight")).to(case.dtype)
        for name in names
    }


def lengths_of(case: OpCase, device: torch.device) -> Inputs:
    bounds = torch.tensor([0, *case.workload.lengths]).cumsum(0).to(torch.int32)
    return {
        "lengths": case.workload.lengths,
        "cu_seqlens": bounds.to(device),
        "longest": max(case.workload.lengths),
    }


def rows_moved(rows: int) -> Callable[[OpCase], int]:
    """So many rows of the hidden size for each token."""
    return lambda case: rows * case.workload.tokens * case.width.hidden * case.dtype.itemsize


def by_element(count: int) -> Callable[[OpCase], int]:
    """So many operations for each element of the hidden state."""
    return lambda case: count * case.workload.tokens * case.width.hidden
