"""Rate after rate, one system beside the other: how much load each holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from examples.ticket_routing.desk import Desk
from examples.ticket_routing.stream import Measured, Stream

HOPELESS = 4
"""A system whose p99 is so many times the limit is left out from then on."""

# Shares of the tickets a second that the fastest system does without any waiting.
_SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def rates_for(throughput: float) -> list[float]:
    """Rates worth trying on a machine that does so many tickets a second, to two digits."""
    return [float(f"{share * throughput:.2g}") for share in _SHARES]


def sweep(
    stream: Stream,
    desks: Mapping[str, Desk],
    rates: Sequence[float],
    *,
    seconds: float,
    tickets: int,
    limit: float,
    seed: int,
) -> Iterator[tuple[str, Measured]]:
    """Measure each system at each rate, in turn, from the lowest on.

    All get the same tickets at the same moments, for ``seconds`` and no fewer than ``tickets``. A
    system that is far above ``limit`` is left out from then on: its queue would only grow.
    """
    left = list(desks)
    for rate in sorted(rates):
        for name in list(left):
            measured = stream.measure(desks[name], rate, max(seconds, tickets / rate), seed)
            if not is_held(measured, HOPELESS * limit):
                left.remove(name)
            yield name, measured


def is_held(measured: Measured, limit: float) -> bool:
    """Whether 99 of 100 answers came within ``limit`` seconds."""
    return measured.latencies.percentile(99) < limit


def typical(points: Sequence[Measured]) -> list[Measured]:
    """One measurement for each rate, from the lowest on: that with the median p99.

    Of an even number it is the better one of the two in the middle.
    """
    by_rate: dict[float, list[Measured]] = {}
    for measured in points:
        by_rate.setdefault(measured.rate, []).append(measured)
    return [
        sorted(same, key=lambda one: one.latencies.percentile(99))[(len(same) - 1) // 2]
        for _, same in sorted(by_rate.items())
    ]


def highest_held(points: Sequence[Measured], limit: float) -> float | None:
    """The highest rate below the first that was not held; ``None`` where that is the lowest."""
    held = None
    for measured in typical(points):
        if not is_held(measured, limit):
            break
        held = measured.rate
    return held
