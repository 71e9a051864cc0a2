"""Open-loop load: tickets come when they come, however far behind the router is.

A closed loop, in which each caller waits for an answer before it asks again, slows down with the
system that it measures and never sees the queue (coordinated omission). Here the moments of
arrival are drawn beforehand, and latency counts from the moment that was drawn, also where the
sender itself was late.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Latencies:
    """How long each answer took, counted from its scheduled arrival.

    Attributes:
        seconds: of the answers, in the order of arrival.
        failed: how many got an error instead.
        duration: seconds from the start to the last answer.
    """

    seconds: tuple[float, ...]
    failed: int
    duration: float

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return len(self.seconds) / self.duration if self.duration else 0.0

    def percentile(self, percent: float) -> float:
        """The smallest measured latency that ``percent`` of the answers did not exceed.

        An error counts as an answer that never came.
        """
        everything = [*self.seconds, *[np.inf] * self.failed]
        if not everything:
            return np.nan
        return float(np.percentile(everything, percent, method="inverted_cdf"))


def poisson(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Moments of arrival within ``seconds``, at ``rate`` a second, independent of each other."""
    generator = np.random.default_rng(seed)
    # four standard deviations more than will be needed
    number = int(rate * seconds + 4 * (rate * seconds) ** 0.5 + 10)
    moments = generator.exponential(1 / rate, number).cumsum()
    return moments[moments < seconds]


async def open_loop(
    send: Callable[[S], Awaitable[object]], items: Sequence[S], moments: Sequence[float]
) -> Latencies:
    """Send each item at its moment, in seconds from now, and wait until all are answered."""
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def one(item: S, moment: float) -> float | None:
        try:
            await send(item)
        except Exception:
            return None
        return loop.time() - start - moment

    tasks = []
    for item, moment in zip(items, moments, strict=True):
        await asyncio.sleep(start + moment - loop.time())
        tasks.append(asyncio.create_task(one(item, moment)))
    answers = await asyncio.gather(*tasks)
    seconds = tuple(answer for answer in answers if answer is not None)
    return Latencies(seconds, len(answers) - len(seconds), loop.time() - start)


def precise_loop() -> asyncio.AbstractEventLoop:
    """An event loop with timers of microseconds: that of epoll rounds up to a millisecond."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())
