"""A live stream in micro-batches: many callers wait, each for its own result; one model works.

While the model is busy, what comes in waits and makes up the next batch. While it is free, a ticket
waits for company, but no longer than ``Limits.max_wait``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

from examples.ticket_routing.batching import Batcher, Limits, Work

S = TypeVar("S")
R = TypeVar("R")


class ClosedError(RuntimeError):
    """The router takes nothing more."""


@dataclass(eq=False, slots=True)
class _Waiting(Generic[S, R]):
    item: S
    result: asyncio.Future[R]


class Router(Generic[S, R]):
    """Collects items into batches for ``compute``; an async context manager.

    Leaving it in good order finishes what was submitted. Leaving it by an exception or by
    cancellation drops what waits: those who wait get ``CancelledError``.

    Args:
        compute: from the items of a batch to a result for each, in their order. It should leave
            the event loop free, in a thread for example.
        size: what an item counts for.
        work: what a batch of such sizes costs.
        limits: how long and how much is collected.
        max_waiting: how many items may wait; whoever submits one more waits for room first.

    Attributes:
        batches: how many batches have been computed.
    """

    def __init__(
        self,
        compute: Callable[[list[S]], Awaitable[Sequence[R]]],
        *,
        limits: Limits,
        size: Callable[[S], int],
        work: Work = sum,
        max_waiting: int = 1024,
    ) -> None:
        self._compute = compute
        self._size = size
        self._batcher: Batcher[_Waiting[S, R]] = Batcher(limits, work)
        self._room = asyncio.Semaphore(max_waiting)
        self._changed = asyncio.Event()
        self._closing = False
        self._worker: asyncio.Task[None] | None = None
        self._inside: set[asyncio.Future[R]] = set()
        self.batches = 0

    async def submit(self, item: S) -> R:
        """The result for one item.

        Raises:
            ClosedError: the router is closed.
            Exception: what ``compute`` raised on this item; other items are not affected.
        """
        size = self._size(item)
        await self._room.acquire()
        if self._closing:
            self._room.release()
            raise ClosedError("the router is closed")
        loop = asyncio.get_running_loop()
        result: asyncio.Future[R] = loop.create_future()
        self._inside.add(result)
        result.add_done_callback(self._inside.discard)
        self._batcher.add(_Waiting(item, result), size, loop.time())
        self._changed.set()
        return await result

    async def __aenter__(self) -> Router[S, R]:
        self._worker = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._worker is not None
        self._closing = True
        self._changed.set()
        if kind is not None:
            self._worker.cancel()
        try:
            await self._worker
        except asyncio.CancelledError:
            if kind is None:
                raise

    async def _run(self) -> None:
        try:
            while await self._collect():
                batch = self._batcher.take()
                for _ in batch:
                    self._room.release()
                await self._serve(batch)
        finally:
            # also where this was cancelled: nobody may wait for ever
            self._closing = True
            for result in list(self._inside):
                result.cancel()
            for _ in range(len(self._batcher)):
                self._room.release()

    async def _collect(self) -> bool:
        """Wait until there is a batch; false when there will be none any more."""
        loop = asyncio.get_running_loop()
        while not self._batcher.is_due(loop.time()):
            if self._closing:
                return len(self._batcher) > 0
            self._changed.clear()
            try:
                async with asyncio.timeout_at(self._batcher.deadline):
                    await self._changed.wait()
            except TimeoutError:
                pass
        return True

    async def _serve(self, batch: Sequence[_Waiting[S, R]]) -> None:
        """Compute a batch; where that fails, its halves, until the item at fault is alone."""
        # who waited for it may have given up
        batch = [waiting for waiting in batch if not waiting.result.done()]
        if not batch:
            return
        self.batches += 1
        try:
            results = await self._compute([waiting.item for waiting in batch])
            pairs = list(zip(batch, results, strict=True))
        except Exception as error:
            if len(batch) == 1:
                _settle(batch[0].result, error)
                return
            middle = len(batch) // 2
            await self._serve(batch[:middle])
            await self._serve(batch[middle:])
        else:
            for waiting, result in pairs:
                _settle(waiting.result, result)


def _settle(future: asyncio.Future[R], result: R | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
