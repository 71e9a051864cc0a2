"""Ways to run a model, and what was measured of them, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch

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


def mixed_lengths(count: int, longest: int) -> list[int]:
    """Lengths from short to ``longest``, the shorter ones closer together, as texts come.

    Some 53% of such a batch is padding.
    """
    shortest = min(longest, max(4, longest // 32))
    steps = max(1, count - 1)
    return [shortest + round((longest - shortest) * (i / steps) ** 1.2) for i in range(count)]
