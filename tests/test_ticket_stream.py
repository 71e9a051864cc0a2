"""The ticket routing example's live stream: micro-batches, failures, shutdown and latencies.

All but the handover between threads runs in virtual time: waits and latencies are exact and take
none.
"""

import asyncio
import selectors
import sys
import threading
from collections.abc import Awaitable, Sequence
from pathlib import Path

import numpy as np
import pytest

# `pytest` alone, unlike `python -m pytest`, does not look for packages at the top of the clone
sys.path.append(str(Path(__file__).parents[1]))

from examples.ticket_routing.arrivals import Latencies, open_loop, poisson, precise_loop
from examples.ticket_routing.batching import Batcher, Limits
from examples.ticket_routing.handover import Handover
from examples.ticket_routing.router import ClosedError, Router


def test_a_batch_goes_when_the_oldest_has_waited() -> None:
    batcher: Batcher[str] = Batcher(Limits(max_wait=0.5, budget=100))
    assert batcher.deadline is None and not batcher.is_due(99)
    batcher.add("a", 10, now=1.0)
    batcher.add("b", 10, now=1.4)
    assert batcher.deadline == 1.5
    assert not batcher.is_due(1.49) and batcher.is_due(1.5)
    assert batcher.take() == ["a", "b"] and len(batcher) == 0 and batcher.take() == []


def test_a_batch_goes_when_the_budget_is_used_up() -> None:
    batcher: Batcher[str] = Batcher(Limits(max_wait=9, budget=100))
    for name, size in (("a", 60), ("b", 30), ("c", 20), ("d", 500), ("e", 1)):
        batcher.add(name, size, now=0)
    assert batcher.is_due(0)
    # in order: d, too long for any batch, is one by itself and lets none past
    assert [batcher.take() for _ in range(4)] == [["a", "b"], ["c"], ["d"], ["e"]]
    batcher.add("f", 99, now=0)
    assert not batcher.is_due(0)
    batcher.add("g", 1, now=0)
    assert batcher.is_due(0) and batcher.take() == ["f", "g"]


def test_a_padded_batch_costs_what_its_longest_text_does() -> None:
    batcher: Batcher[str] = Batcher(Limits(1, 100), lambda sizes: len(sizes) * max(sizes))
    for name, size in (("a", 10), ("b", 40), ("c", 10)):
        batcher.add(name, size, now=0)
    assert batcher.is_due(0) and batcher.take() == ["a", "b"]


@pytest.mark.parametrize(("limits", "name"), [((-1, 5), "max_wait"), ((1, 0), "budget")])
def test_limits_that_are_none(limits: tuple[float, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(*limits)


class _Jump(selectors.SelectSelector):
    """Instead of waiting, sets the loop's clock forward."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits, and nothing will ever happen"
            self.loop.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which waiting takes no time, and the clock is exact."""

    def __init__(self) -> None:
        selector = _Jump()
        selector.loop, self.now = self, 0.0
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run(main: Awaitable) -> object:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class FakeModel:
    """Takes ``seconds`` for a batch; fails on a batch that holds a text in ``bad``."""

    def __init__(self, seconds: float = 1.0, bad: Sequence[str] = ()) -> None:
        self.seconds, self.bad = seconds, bad
        self.batches: list[tuple[float, list[str]]] = []

    async def __call__(self, texts: list[str]) -> list[str]:
        self.batches.append((asyncio.get_running_loop().time(), texts))
        await asyncio.sleep(self.seconds)
        for text in texts:
            if text in self.bad:
                raise ValueError(f"can't read {text}")
        return [text.upper() for text in texts]

    def router(self, max_wait: float = 0.5, budget: int = 10, **options: int) -> Router[str, str]:
        return Router(self, limits=Limits(max_wait, budget), size=len, **options)


async def send(router: Router[str, str], *timed: tuple[float, str]) -> list[object]:
    """Submit texts at given times; their results or errors, in order."""

    async def one(moment: float, text: str) -> str:
        await asyncio.sleep(moment)
        return await router.submit(text)

    return await asyncio.gather(*(one(*item) for item in timed), return_exceptions=True)


def test_what_comes_within_the_wait_is_one_batch_in_order() -> None:
    model = FakeModel()

    async def main() -> list[object]:
        async with model.router() as router:
            return await send(router, (0, "a"), (0.2, "b"), (0.45, "c"), (3, "d"))

    assert run(main()) == ["A", "B", "C", "D"]
    assert model.batches == [(0.5, ["a", "b", "c"]), (3.5, ["d"])]


def test_a_full_budget_does_not_wait() -> None:
    model = FakeModel()

    async def main() -> list[object]:
        async with model.router() as router:
            return await send(router, (0.1, "aaaaa"), (0.2, "bbbbb"), (0.2, "c"))

    assert run(main()) == ["AAAAA", "BBBBB", "C"]
    assert model.batches == [(pytest.approx(0.2), ["aaaaa", "bbbbb"]), (pytest.approx(1.2), ["c"])]


def test_what_comes_while_the_model_is_busy_is_the_next_batch() -> None:
    model = FakeModel(seconds=2)

    async def main() -> list[object]:
        async with model.router() as router:
            return await send(router, (0, "a"), (0.6, "b"), (1.1, "c"), (2.4, "d"))

    assert run(main()) == ["A", "B", "C", "D"]
    # the first ends at 2.5, by when all of them have come and the oldest has waited enough
    assert model.batches == [(0.5, ["a"]), (2.5, ["b", "c", "d"])]


def test_one_failing_text_harms_no_other() -> None:
    model = FakeModel(bad=["x"])

    async def main() -> list[object]:
        async with model.router() as router:
            texts = [(0.0, text) for text in "abxcd"]
            return await send(router, *texts, (60, "later"))

    results = run(main())
    assert results[:2] == ["A", "B"] and results[3:] == ["C", "D", "LATER"]
    assert isinstance(results[2], ValueError) and "can't read x" in str(results[2])
    assert [texts for _, texts in model.batches[:4]] == [
        list("abxcd"),
        list("ab"),
        list("xcd"),
        ["x"],
    ]


def test_a_model_that_returns_too_few_results_is_an_error() -> None:
    async def short(texts: list[str]) -> list[str]:
        return texts[1:]

    async def main() -> list[object]:
        async with Router(short, limits=Limits(0.1, 10), size=len) as router:
            return await send(router, (0, "a"), (0, "b"))

    assert all(isinstance(result, ValueError) for result in run(main()))


def test_a_text_that_has_no_size_fails_alone() -> None:
    model = FakeModel()

    async def main() -> list[object]:
        async with model.router() as router:
            return await send(router, (0, 5), (0, "a"))  # type: ignore[arg-type]

    results = run(main())
    assert isinstance(results[0], TypeError) and results[1] == "A"


def test_back_pressure() -> None:
    model = FakeModel(seconds=1)
    admitted = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        router = Router(
            model,
            limits=Limits(0, 1),
            size=lambda text: admitted.append(None) or 1,
            max_waiting=2,
        )
        async with router:
            tasks = [asyncio.create_task(router.submit(text)) for text in "abcde"]
            await asyncio.sleep(0.5)
            # one is computed, two wait, and two are kept outside
            assert len(router._batcher) == 2
            assert await asyncio.gather(*tasks) == list("ABCDE")
            assert loop.time() == pytest.approx(5)

    run(main())
    assert [texts for _, texts in model.batches] == [[text] for text in "abcde"]


def test_leaving_finishes_what_was_submitted() -> None:
    model = FakeModel()

    async def main() -> None:
        router = model.router(max_wait=100)
        async with router:
            waiting = asyncio.create_task(router.submit("a"))
            await asyncio.sleep(1)
        # it did not wait for the rest of the hundred seconds
        assert asyncio.get_running_loop().time() == pytest.approx(2)
        assert await waiting == "A"
        with pytest.raises(ClosedError):
            await router.submit("b")

    run(main())


def test_leaving_turns_away_who_waits_for_room() -> None:
    model = FakeModel()

    async def main() -> list[object]:
        async with model.router(max_wait=0, budget=1, max_waiting=1) as router:
            tasks = [asyncio.create_task(router.submit(text)) for text in "abcd"]
            await asyncio.sleep(0.1)
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = run(main())
    assert results[:2] == ["A", "B"] and len(model.batches) == 2
    assert all(isinstance(result, ClosedError) for result in results[2:])


def test_leaving_by_an_exception_leaves_nobody_waiting() -> None:
    model = FakeModel(seconds=1000)
    tasks = []

    async def main() -> None:
        with pytest.raises(KeyError):
            async with model.router(max_wait=0, budget=1, max_waiting=2) as router:
                tasks.extend(asyncio.create_task(router.submit(text)) for text in "abcde")
                await asyncio.sleep(1)
                raise KeyError
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == 3 * [asyncio.CancelledError] + 2 * [
            ClosedError
        ]
        assert asyncio.get_running_loop().time() == pytest.approx(1)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


def test_who_gives_up_is_not_computed() -> None:
    model = FakeModel()

    async def main() -> None:
        async with model.router() as router:
            given_up = asyncio.create_task(router.submit("a"))
            kept = asyncio.create_task(router.submit("b"))
            await asyncio.sleep(0.1)
            given_up.cancel()
            assert await kept == "B"

    run(main())
    assert model.batches == [(0.5, ["b"])]


def test_latency_counts_from_the_scheduled_arrival() -> None:
    """Ten tickets, one each 0.1 s, each of which takes 1 s: a closed loop would see 1 s for all."""
    model = FakeModel(seconds=1)

    async def main() -> Latencies:
        async with model.router(max_wait=0, budget=1) as router:
            moments = [0.1 * number for number in range(10)]
            return await open_loop(router.submit, "abcdefghij", moments)

    found = run(main())
    assert found.seconds == pytest.approx([1 + 0.9 * number for number in range(10)])
    assert found.failed == 0 and found.duration == pytest.approx(10)
    assert found.throughput == pytest.approx(1)


def test_a_sender_that_is_late_is_counted() -> None:
    """The loop stands still for 5 s during the first: those behind it were due all the same."""

    async def main() -> Latencies:
        loop = asyncio.get_running_loop()

        async def answer(text: str) -> None:
            if text == "a":
                loop.now += 5
            await asyncio.sleep(0.5)

        return await open_loop(answer, "abc", [0, 1, 7])

    assert run(main()).seconds == pytest.approx([5.5, 4.5, 0.5])


def test_percentiles() -> None:
    found = Latencies(tuple(second / 100 for second in range(100, 0, -1)), 0, 1)
    assert [found.percentile(p) for p in (50, 95, 99, 100)] == [0.5, 0.95, 0.99, 1.0]
    # what failed was never answered
    failed = Latencies(found.seconds, 2, 1)
    assert failed.percentile(50) == 0.51 and failed.percentile(99) == np.inf
    assert np.isnan(Latencies((), 0, 0).percentile(50))

    async def main() -> Latencies:
        async def fail(text: str) -> None:
            if text == "b":
                raise ValueError

        return await open_loop(fail, "abc", [0, 1, 2])

    counted = run(main())
    assert counted.failed == 1 and len(counted.seconds) == 2


def test_poisson_arrivals() -> None:
    moments = poisson(rate=200, seconds=50, seed=1)
    assert np.array_equal(moments, poisson(200, 50, 1)) and (np.diff(moments) > 0).all()
    assert moments[0] >= 0 and moments[-1] < 50 and len(moments) == pytest.approx(10000, rel=0.05)
    gaps = np.diff(moments)
    # an exponential's standard deviation is its mean
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 200, rel=0.05)


def test_what_is_handed_over_runs_in_the_caller_s_thread() -> None:
    handover, here = Handover(precise_loop), threading.get_ident()

    async def main() -> tuple[int, int, list[int]]:
        alone = await handover.call(lambda _: threading.get_ident(), None)
        return (
            threading.get_ident(),
            alone,
            await asyncio.gather(
                *(handover.call(lambda number: number * number, number) for number in range(5))
            ),
        )

    event_loop, computed, squares = handover.run(main())
    assert event_loop != here and computed == here and squares == [0, 1, 4, 9, 16]
    # it can be used again, and leaves no thread behind
    assert handover.run(asyncio.sleep(0, "again")) == "again"
    assert not [t for t in threading.enumerate() if t.name.startswith("event-loop")]


def test_errors_cross_the_threads() -> None:
    handover = Handover(precise_loop)

    async def main(catch: bool) -> str:
        try:
            await handover.call(int, "no number")
        except ValueError as error:
            if not catch:
                raise
            return str(error)
        return "nothing raised"

    assert "no number" in handover.run(main(catch=True))
    with pytest.raises(ValueError, match="no number"):
        handover.run(main(catch=False))


def test_ctrl_c_ends_both_threads() -> None:
    handover, ended = Handover(precise_loop), []

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        try:
            async with Router(
                lambda batch: handover.call(interrupted, batch), limits=Limits(0, 1), size=len
            ) as router:
                await router.submit("a")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    with pytest.raises(KeyboardInterrupt):
        handover.run(main())
    assert ended == ["cancelled"]
    assert not [t for t in threading.enumerate() if t.name.startswith("event-loop")]
