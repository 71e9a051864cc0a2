"""Tickets about the same thing: near neighbours among the vectors of the last few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Where nothing says which tickets are duplicates, one pair of tickets in so many may be taken for
# one, by chance.
PAIRS_PER_FALSE_ALARM = 2000


class Recent:
    """The unit vectors of the last ``size`` tickets, with their ids."""

    def __init__(self, size: int, dimension: int) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self._vectors = np.zeros((size, dimension), dtype=np.float32)
        self._ids: list[str] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._ids)

    def nearest(self, vector: np.ndarray) -> tuple[str | None, float]:
        """The id of the ticket most like this one, and the cosine; ``(None, 0)`` if none is."""
        if not self._ids:
            return None, 0.0
        cosines = self._vectors[: len(self._ids)] @ vector
        best = int(cosines.argmax())
        return self._ids[best], float(cosines[best])

    def add(self, id: str, vector: np.ndarray) -> None:
        """Remember a ticket, in place of the oldest once the window is full."""
        self._vectors[self._next] = vector
        if len(self._ids) < len(self._vectors):
            self._ids.append(id)
        else:
            self._ids[self._next] = id
        self._next = (self._next + 1) % len(self._vectors)


@dataclass(frozen=True, slots=True)
class Matches:
    """What a threshold finds in a stream of tickets.

    Attributes:
        flagged: tickets that were taken for a duplicate of an earlier one.
        right: those of them whose nearest neighbour really is about the same incident.
        wanted: tickets that have an earlier one about the same incident.
    """

    flagged: int
    right: int
    wanted: int

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        return 2 * self.right / (self.flagged + self.wanted) if self.wanted else 0.0


def matches(vectors: np.ndarray, groups: Sequence[str | None], threshold: float) -> Matches:
    """Run tickets in their order through a window that holds them all."""
    cosine, same, wanted = _nearest_earlier(vectors, groups)
    flagged = cosine >= threshold
    return Matches(int(flagged.sum()), int((flagged & same).sum()), wanted)


def choose_threshold(vectors: np.ndarray, groups: Sequence[str | None]) -> float:
    """The cosine from which on two tickets count as duplicates: the one with the best F1.

    Where no group is known, one pair in ``PAIRS_PER_FALSE_ALARM`` is above it.
    """
    cosine, same, wanted = _nearest_earlier(vectors, groups)
    if not wanted:
        pairs = (vectors @ vectors.T)[np.tril_indices(len(vectors), -1)]
        return float(np.quantile(pairs, 1 - 1 / PAIRS_PER_FALSE_ALARM))
    order = np.argsort(-cosine, kind="stable")
    right = same[order].cumsum()
    scores = 2 * right / (np.arange(1, len(order) + 1) + wanted)
    best = int(scores.argmax())
    below = cosine[order[min(best + 1, len(order) - 1)]]
    return float(cosine[order[best]] + below) / 2


def _nearest_earlier(
    vectors: np.ndarray, groups: Sequence[str | None]
) -> tuple[np.ndarray, np.ndarray, int]:
    """For each ticket the cosine of its nearest earlier one and whether that is of its group; and
    how many tickets have an earlier one of their group."""
    cosines = np.tril(vectors @ vectors.T, -1)
    nearest = cosines.argmax(axis=1)
    names = [group if group is not None else number for number, group in enumerate(groups)]
    same = np.array([names[i] == names[j] and i > j for i, j in enumerate(nearest)])
    wanted = len(names) - len(set(names))
    return cosines[np.arange(len(nearest)), nearest], same, wanted
