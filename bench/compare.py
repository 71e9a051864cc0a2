"""Two records side by side, with a verdict that knows how much chance moves a figure.

A machine is not the same from one run to the next, and the peers show by how much: they did not
change between two commits of ours, so what their times did in common is the machine's drift, and
what is left between them is its noise. A figure of ours is faster or slower only if it moved, less
the drift, by more than the peers scatter, by more than the samples of both runs spread, and by more
than 3%.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.record import OK, Record, Row
from bench.sources import changed
from bench.timing import quantile

LEAST = 0.03
FASTER, SLOWER, SAME = "faster", "slower", "same"


@dataclass(frozen=True, slots=True)
class Drift:
    """What the peers say of the machine.

    Attributes:
        factor: the median of their times in B in units of those in A.
        scatter: from that median to the 20th or 80th percentile, whichever is further, as a share.
        peers: how many there are; with fewer than three nothing is known.
    """

    factor: float = 1.0
    scatter: float = 0.0
    peers: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """One figure in both records.

    Attributes:
        change: B's time over A's, less the drift; below 1 is faster.
        noise: what chance may account for, as a share.
        sources: our files behind the figure that changed between the records.
    """

    key: tuple[str, str, str]
    before: float
    after: float
    change: float
    noise: float
    word: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything found by :func:`compare`.

    Attributes:
        lost: figures of A that B does not have, with B's reason where it gives one.
        gained: figures of B that A does not have.
    """

    drift: Drift
    verdicts: tuple[Verdict, ...]
    lost: tuple[str, ...]
    gained: tuple[str, ...]
    warnings: tuple[str, ...]


def compare(a: Record, b: Record) -> Comparison:
    """What changed for encoder_fast from record ``a`` to record ``b``.

    Raises:
        ValueError: they are of different machines, or of a run in miniature.
    """
    for fact in ("device", "threads", "kind"):
        one, other = a.header["machine"][fact], b.header["machine"][fact]
        if one != other:
            raise ValueError(f"the records are of different machines: {fact} {one} and {other}")
    if a.header["fake"] or b.header["fake"]:
        raise ValueError("a run in miniature measures nothing")
    before = {row.key: row for row in a.rows if row.status == OK}
    after = {row.key: row for row in b.rows if row.status == OK}
    both = [key for key in before if key in after]
    drift = _drift([(before[key], after[key]) for key in both if not before[key].ours])
    verdicts = tuple(
        _judge(before[key], after[key], drift, a, b) for key in both if before[key].ours
    )
    reasons = {row.key: f": {row.status}, {row.reason}" for row in b.rows if row.status != OK}
    lost = (
        ", ".join(key) + reasons.get(key, "")
        for key, row in before.items()
        if row.ours and key not in after
    )
    gained = (", ".join(key) for key, row in after.items() if row.ours and key not in before)
    return Comparison(drift, verdicts, tuple(lost), tuple(gained), tuple(_warnings(a, b)))


def _drift(pairs: list[tuple[Row, Row]]) -> Drift:
    if len(pairs) < 3:
        return Drift(peers=len(pairs))
    ratios = [after.median / before.median for before, after in pairs]
    middle = quantile(ratios, 0.5)
    scatter = max(middle - quantile(ratios, 0.2), quantile(ratios, 0.8) - middle) / middle
    return Drift(middle, scatter, len(pairs))


def _judge(before: Row, after: Row, drift: Drift, a: Record, b: Record) -> Verdict:
    change = after.median / before.median / drift.factor
    # Half of the way from the 20th to the 80th percentile is what one sample may be off.
    noise = max(LEAST, drift.scatter, before.spread / 2, after.spread / 2)
    word = SAME
    if change < 1 / (1 + noise):
        word = FASTER
    elif change > 1 + noise:
        word = SLOWER
    sources = changed(after.sources, a.header["sources"], b.header["sources"])
    return Verdict(before.key, before.median, after.median, change, noise, word, sources)


def _warnings(a: Record, b: Record) -> Iterator[str]:
    for name, record in (("A", a), ("B", b)):
        if not record.header["finished"]:
            yield f"{name} was stopped before its end"
        if record.header["commit"].endswith("-dirty"):
            yield f"{name} ran a tree with changes that are in no commit"
    theirs, ours = a.header["machine"]["versions"], b.header["machine"]["versions"]
    for package in sorted({*theirs, *ours}):
        one, other = theirs.get(package, "not listed"), ours.get(package, "not listed")
        if one != other:
            yield f"{package} is {one} in A and {other} in B"
