"""Work ahead in a second thread, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def one_ahead(items: Iterable[S], work: Callable[[S], T]) -> Generator[T, None, None]:
    """Yield ``work(item)`` in order; while the caller uses one result, the next is in the making.

    ``items`` is read in the caller's thread, for an iterator may belong to it (a database cursor).
    Closing the generator, or an exception in the caller such as Ctrl-C, ends the thread: the item
    that it is at is waited for, one that it has not begun is dropped.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="encoder_fast")
    try:
        pending: Future[T] | None = None
        for item in items:
            following = pool.submit(work, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
