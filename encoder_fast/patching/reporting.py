"""What runs fast, on which backend, what fell back, how often, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from torch import nn

from encoder_fast.graphs import GraphReport
from encoder_fast.patching.locate import STATE, root_module


@dataclass
class Counts:
    """The calls of one encoder. Safe to share between threads."""

    fast: int = 0
    pooled: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    zeros_to: dict[str, None] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def count_fast(self) -> None:
        with self._lock:
            self.fast += 1

    def count_pooled(self) -> None:
        with self._lock:
            self.pooled += 1

    def count_fallback(self, reason: str) -> None:
        with self._lock:
            self.fallbacks[reason] += 1

    def count_zeros(self, reader: str) -> None:
        with self._lock:
            self.zeros_to[reader] = None

    def snapshot(self) -> tuple[int, int, dict[str, int], tuple[str, ...]]:
        with self._lock:
            return self.fast, self.pooled, dict(self.fallbacks), tuple(self.zeros_to)


@dataclass(frozen=True)
class EncoderReport:
    """One encoder inside the model.

    Attributes:
        path: where it sits, ``""`` for the model itself.
        model_class: the name of its class.
        family: the family that read it.
        backend: the backend of its last fast call, or the one chosen at patch time.
        why: why that backend.
        fast_calls: calls that ran on the fast path.
        pooled_calls: those of them that pooled the packed tokens for a ``SentenceTransformer``.
        fallbacks: calls that ran the original forward, by reason.
        graphs: its CUDA graphs; ``None`` where they were not asked for.
        zeros_to: the user's own code that got zeros in place of padding from fast calls.
    """

    path: str
    model_class: str
    family: str
    backend: str
    why: str
    fast_calls: int
    pooled_calls: int
    fallbacks: dict[str, int]
    graphs: GraphReport | None = None
    zeros_to: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" at {self.path}" if self.path else ""
        lines = [
            f"{self.model_class}{where}: family {self.family}, backend {self.backend} ({self.why})",
            f"  fast calls: {self.fast_calls}",
        ]
        if self.pooled_calls:
            lines.append(f"  of them pooled without padding: {self.pooled_calls}")
        if self.zeros_to:
            lines.append(f"  padding was returned as zeros to {', '.join(self.zeros_to)}")
        if self.fallbacks:
            lines.append(f"  original forward: {sum(self.fallbacks.values())}")
            for reason, count in sorted(self.fallbacks.items(), key=lambda item: -item[1]):
                lines.append(f"    {count} x {reason}")
        if self.graphs is not None:
            lines += [f"  {line}" for line in str(self.graphs).splitlines()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What :func:`report` returns; ``print`` it."""

    encoders: tuple[EncoderReport, ...]

    @property
    def fast_calls(self) -> int:
        return sum(encoder.fast_calls for encoder in self.encoders)

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that ran the original forward, by reason, over all encoders."""
        total: Counter[str] = Counter()
        for encoder in self.encoders:
            total.update(encoder.fallbacks)
        return dict(total)

    def __str__(self) -> str:
        return "\n".join(map(str, self.encoders)) or "not patched"


def report(model: object) -> Report:
    """What has run in a patched model since it was patched.

    Args:
        model: what was given to :func:`~encoder_fast.patch`, or any module that holds it.

    Returns:
        A :class:`Report`, one entry for each patched encoder; empty where nothing is patched.
    """
    entries = []
    for path, module in root_module(model).named_modules():
        state = module.__dict__.get(STATE)
        if hasattr(state, "counts"):  # a patched head has none
            entries.append(_entry(path, module, state))
    return Report(tuple(entries))


def _entry(path: str, module: nn.Module, state: Any) -> EncoderReport:
    fast, pooled, fallbacks, zeros_to = state.counts.snapshot()
    backend, why = state.chosen
    return EncoderReport(
        path=path,
        model_class=type(module).__name__,
        family=state.family.name,
        backend=backend,
        why=why,
        fast_calls=fast,
        pooled_calls=pooled,
        fallbacks=fallbacks,
        graphs=None if state.graph_counts is None else state.graph_counts.report(),
        zeros_to=zeros_to,
    )
