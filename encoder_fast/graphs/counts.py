"""How often a forward went through a graph, and why it did not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from threading import Lock


@dataclass(frozen=True, slots=True)
class GraphReport:
    """What ``report()`` tells of an encoder's CUDA graphs.

    Attributes:
        recorded: graphs that were recorded, those that were dropped since included.
        replayed: fast calls that a graph ran.
        without: fast calls that ran kernel by kernel, by reason.
    """

    recorded: int
    replayed: int
    without: dict[str, int]

    def __str__(self) -> str:
        lines = [f"CUDA graphs: {self.recorded} recorded, {self.replayed} calls replayed"]
        for reason, count in sorted(self.without.items(), key=lambda item: -item[1]):
            lines.append(f"  {count} x without: {reason}")
        return "\n".join(lines)


@dataclass
class GraphCounts:
    """The counts behind a :class:`GraphReport`. Safe to share between threads."""

    recorded: int = 0
    replayed: int = 0
    without: Counter[str] = field(default_factory=Counter)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def count_recorded(self) -> None:
        with self._lock:
            self.recorded += 1

    def count_replayed(self) -> None:
        with self._lock:
            self.replayed += 1

    def count_without(self, reason: str) -> None:
        with self._lock:
            self.without[reason] += 1

    def report(self) -> GraphReport:
        with self._lock:
            return GraphReport(self.recorded, self.replayed, dict(self.without))
