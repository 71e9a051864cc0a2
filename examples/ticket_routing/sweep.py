"""Rate after rate, one system beside the other: how much load each holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from examples.ticket_routing.desk import Desk
from examples.ticket_routing.stream import Measured, Stream

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
    limit: float,
    seed: int,
) -> Iterator[tuple[str, Measured]]:
    """Measure each system at each rate, in turn, from the lowest on.

    All get the same tickets at the same moments. A system that misses ``limit`` is left out from
    then on: above, its queue only grows.
    """
    left = list(desks)
    for rate in sorted(rates):
        for name in list(left):
            measured = stream.measure(desks[name], rate, seconds, seed)
            if not is_held(measured, limit):
                left.remove(name)
            yield name, measured


def is_held(measured: Measured, limit: float) -> bool:
    """Whether 99 of 100 answers came within ``limit`` seconds."""
    return measured.latencies.percentile(99) < limit


def highest_held(points: Sequence[Measured], limit: float) -> float | None:
    """The highest rate below the first that was not held; ``None`` where that is the lowest."""
    held = None
    for measured in sorted(points, key=lambda one: one.rate):
        if not is_held(measured, limit):
            break
        held = measured.rate
    return held
