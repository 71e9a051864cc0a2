"""A desk behind a router, under a load: one measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from examples.ticket_routing.arrivals import Latencies, open_loop, poisson, precise_loop
from examples.ticket_routing.batching import Limits
from examples.ticket_routing.desk import Decision, Desk, Message
from examples.ticket_routing.handover import Handover
from examples.ticket_routing.router import Router


@dataclass(frozen=True, slots=True)
class Measured:
    """One rate of arrival.

    Attributes:
        rate: tickets a second that were sent, on average.
        latencies: of all of them.
        batches: how many batches they were answered in.
        decisions: on all that got one, in the order of their answers.
    """

    rate: float
    latencies: Latencies
    batches: int
    decisions: tuple[Decision, ...]


class Stream:
    """Runs measurements, one after another.

    Args:
        texts: the tickets that are sent, again and again from the first.
        limits: of the router.
    """

    def __init__(self, texts: Sequence[str], limits: Limits) -> None:
        self._texts = texts
        self._limits = limits

    def warm_up(self, desk: Desk) -> None:
        """Batches of several sizes, not measured: caches are filled, kernels are compiled."""
        for count in (1, 2, 4, 8, 16, 1):
            desk.decide([Message("", text) for text in self._texts[:count]])

    def measure(self, desk: Desk, rate: float, seconds: float, seed: int) -> Measured:
        """Send Poisson arrivals at ``rate`` tickets a second for ``seconds``."""
        moments = poisson(rate, seconds, seed).tolist()
        count = len(self._texts)
        messages = [
            Message(f"{number}", self._texts[number % count]) for number in range(len(moments))
        ]
        handover = Handover(precise_loop)
        decisions: list[Decision] = []

        async def compute(batch: list[Message]) -> list[Decision]:
            found = await handover.call(desk.decide, batch)
            decisions.extend(found)
            return found

        async def main() -> tuple[Latencies, int]:
            router: Router[Message, Decision] = Router(
                compute,
                limits=self._limits,
                size=lambda message: desk.encoder.size(message.text),
                work=desk.encoder.work,
            )
            async with router:
                latencies = await open_loop(router.submit, messages, moments)
            return latencies, router.batches

        latencies, batches = handover.run(main())
        return Measured(rate, latencies, batches, tuple(decisions))
