"""Ways to run a model measured against each other, as plain data.

Everything is measured here and now: the contestants run in turn, round after round (A B C, A B C,
…), so that a machine that is busy for a moment is busy for all of them. In its turn each runs twice
and the second call counts: the first finds the caches and the heap as another model left them,
which no service that runs one model ever does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to run the model.

    Attributes:
        label: what it is called in tables.
        attention: transformers' ``attn_implementation``.
        is_patched: by encoder_fast.
        is_compiled: by ``torch.compile``.
    """

    label: str
    dtype: torch.dtype
    attention: str
    is_patched: bool = False
    is_compiled: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """One contestant on one batch: the seconds of each round."""

    label: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """From the 20th to the 80th percentile, as a share of the median."""
        return (self.percentile(0.8) - self.percentile(0.2)) / self.median

    def percentile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[round((len(ordered) - 1) * share)]


@dataclass(frozen=True, slots=True)
class BatchResult:
    """All contestants on one batch; ``baseline`` is the label that the others are compared with."""

    name: str
    lengths: tuple[int, ...]
    timings: tuple[Timing, ...]
    baseline: str

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def padding(self) -> float:
        """The share of the batch that is padding."""
        return 1 - self.tokens / (max(self.lengths) * len(self.lengths))

    def speedup(self, timing: Timing) -> float:
        return next(t for t in self.timings if t.label == self.baseline).median / timing.median


@dataclass(frozen=True, slots=True)
class Rounds:
    """How long a race is: at most ``most`` rounds and, after ``fewest``, at most ``seconds``."""

    most: int
    fewest: int
    seconds: float


def race(models: Mapping[str, nn.Module], inputs: dict[str, Any], rounds: Rounds) -> list[Timing]:
    """Time each model on the same inputs, in turn."""
    device = next(iter(inputs.values())).device
    for model in models.values():
        # the first call prepares weights and compiles kernels
        _time(model, inputs, device)
    seconds: dict[str, list[float]] = {label: [] for label in models}
    deadline = time.perf_counter() + rounds.seconds
    for done in range(rounds.most):
        if done >= rounds.fewest and time.perf_counter() > deadline:
            break
        for label, model in models.items():
            _time(model, inputs, device)
            seconds[label].append(_time(model, inputs, device))
    return [Timing(label, tuple(values)) for label, values in seconds.items()]


@torch.inference_mode()
def _time(model: nn.Module, inputs: dict[str, Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    model(**inputs)
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mixed_lengths(count: int, longest: int) -> list[int]:
    """Lengths from short to ``longest``, the shorter ones closer together, as texts come.

    Some 53% of such a batch is padding.
    """
    shortest = min(longest, max(4, longest // 32))
    steps = max(1, count - 1)
    return [shortest + round((longest - shortest) * (i / steps) ** 1.2) for i in range(count)]
