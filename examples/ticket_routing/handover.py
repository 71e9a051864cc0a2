"""Calls from an event loop that are run in the thread that waits for them.

The model runs in the main thread, and the event loop in another one. The other way round is more
common, but a second thread that computes gets worker threads of its own from OpenMP, which then
sees more threads than processors and lets them sleep at every step: on two cores, single texts took
1.1 to 1.4 times as long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

S = TypeVar("S")
R = TypeVar("R")


class Handover:
    """Runs an event loop in a second thread, and what that hands over in the thread of the caller.

    Args:
        loop_factory: makes the event loop.
    """

    def __init__(self, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self._loop_factory = loop_factory
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    async def call(self, function: Callable[[S], R], argument: S) -> R:
        """``function(argument)``, computed in the thread that is in :meth:`run`."""
        loop = asyncio.get_running_loop()
        answer: Future[R] = Future()

        def compute() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(function(argument))
            except Exception as error:
                answer.set_exception(error)

        self._calls.put(compute)
        return await asyncio.wrap_future(answer, loop=loop)

    def run(self, main: Coroutine[Any, Any, R]) -> R:
        """Run ``main`` in the event loop until it ends, and here what it hands over.

        What interrupts this thread, Ctrl-C for one, cancels ``main`` and waits for its end.
        """
        with (
            asyncio.Runner(loop_factory=self._loop_factory) as runner,
            ThreadPoolExecutor(1, thread_name_prefix="event-loop") as thread,
        ):
            loop = runner.get_loop()
            task = loop.create_task(main)
            task.add_done_callback(lambda _: self._calls.put(None))
            running = thread.submit(loop.run_until_complete, task)
            try:
                while (compute := self._calls.get()) is not None:
                    compute()
            except BaseException:
                loop.call_soon_threadsafe(task.cancel)
                raise
            return running.result()
