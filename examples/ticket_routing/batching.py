"""When what waits is a batch. No clock, no thread: whoever calls says what time it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

Work = Callable[[Sequence[int]], int]
"""From the sizes of a batch's items to what the batch costs."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much is collected.

    Attributes:
        max_wait: seconds that an item waits for others at most, while the model is free.
        budget: what a batch may cost; a single item above it is a batch by itself.
    """

    max_wait: float
    budget: int

    def __post_init__(self) -> None:
        if self.max_wait < 0:
            raise ValueError(f"max_wait must be at least 0 seconds, got {self.max_wait}")
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1, got {self.budget}")


class Batcher(Generic[T]):
    """Items in the order in which they came, cut into batches within ``limits``."""

    def __init__(self, limits: Limits, work: Work = sum) -> None:
        self._limits = limits
        self._work = work
        self._waiting: deque[tuple[T, int, float]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: T, size: int, now: float) -> None:
        self._waiting.append((item, size, now))

    @property
    def deadline(self) -> float | None:
        """When the oldest item will have waited long enough; ``None`` where nothing waits."""
        return self._waiting[0][2] + self._limits.max_wait if self._waiting else None

    def is_due(self, now: float) -> bool:
        """Whether a batch should go now: the oldest has waited, or the budget is used up."""
        deadline = self.deadline
        if deadline is None:
            return False
        return now >= deadline or self._work(self._sizes()) >= self._limits.budget

    def take(self) -> list[T]:
        """The oldest items, as many as the budget holds and at least one."""
        sizes = self._sizes()
        count = 1
        while count < len(sizes) and self._work(sizes[: count + 1]) <= self._limits.budget:
            count += 1
        return [self._waiting.popleft()[0] for _ in range(min(count, len(sizes)))]

    def _sizes(self) -> list[int]:
        return [size for _, size, _ in self._waiting]
