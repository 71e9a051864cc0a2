"""Launches of Triton kernels whose programs run interleaved, as they do on a GPU.

Triton's interpreter runs one program after the other, and so never sees what goes wrong between
programs: a counter that is not atomic counts right. Within `interleaved(seed)` each program has a
thread, one of which runs at a time, and before each access to memory chance decides which goes on.

Each access is recorded too. A launch raises where two programs touch one element, at least one of
them writes it, and not both do so atomically: then chance decides on a GPU, even if it did not
show here. It raises too where a program reads or writes outside the tensors it was given.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any
from unittest.mock import patch

import numpy as np
from triton.runtime import interpreter

# Kinds of access.
READ, WRITE, ATOMIC = range(3)

# Of two accesses, how many a program does in a row, on average, before another one goes on.
IN_A_ROW = 3


class _Abandoned(BaseException):
    """Ends the other programs of a launch."""


class _Launch:
    """The programs of one launch. Only the thread whose turn it is runs."""

    def __init__(
        self,
        fn: Callable[..., None],
        arguments: dict[str, Any],
        operands: list[tuple[int, int]],
        chance: random.Random,
    ) -> None:
        self.fn, self.arguments, self.chance = fn, arguments, chance
        self.operands = operands  # address and bytes of each
        self.builder = interpreter.interpreter_builder
        self.error: BaseException | None = None
        # For each access its kind, its program, and the addresses and values of its elements.
        self.accesses: list[tuple[int, int, np.ndarray, np.ndarray]] = []
        self.places = list(itertools.product(*(range(n) for n in self.builder.grid_dim)))
        self.turns = [threading.Semaphore(0) for _ in self.places]
        self.running = set(range(len(self.places)))
        self.now = 0
        self.done = threading.Event()

    def run(self) -> None:
        threads = [threading.Thread(target=self._program, args=(i,)) for i in self.running]
        for thread in threads:
            thread.start()
        self._hand_over()
        self.done.wait()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def access(self, kind: int, pointers: Any, mask: Any, value: Any = None) -> None:
        """Called by the running program, before it does so."""
        where = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[where]
        inside = np.zeros(addresses.shape, bool)
        for begin, size in self.operands:
            inside |= addresses - np.uint64(begin) < size
        if not inside.all():
            outside = addresses[~inside][0]
            raise AssertionError(f"outside every operand, at {self._named(outside)}")
        values = np.zeros(addresses.shape, np.uint64)
        if value is not None:
            raw = np.ascontiguousarray(np.broadcast_to(value.data, where.shape)[where])
            values = raw.view(f"u{raw.itemsize}").astype(np.uint64)
        self.accesses.append((kind, self.now, addresses, values))
        if self.chance.randrange(IN_A_ROW) == 0:
            program = self.now
            self._hand_over()
            self._wait(program)

    def _hand_over(self) -> None:
        self.now = self.chance.choice(sorted(self.running))
        self.turns[self.now].release()

    def _wait(self, program: int) -> None:
        self.turns[program].acquire()
        if self.error is not None:
            raise _Abandoned
        self.builder.set_grid_idx(*self.places[program])

    def _program(self, program: int) -> None:
        try:
            self._wait(program)
            self.fn(**self.arguments)
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        self.running.discard(program)
        if self.running:
            self._hand_over()
        else:
            self.done.set()

    def check_races(self, one_value: bool) -> None:
        """Raise where programs meet. `one_value` lets plain writes pass that write the same."""
        if not any(kind for kind, *_ in self.accesses):
            return
        sizes = [len(addresses) for _, _, addresses, _ in self.accesses]
        kinds, programs = (np.repeat([a[i] for a in self.accesses], sizes) for i in (0, 1))
        addresses, values = (np.concatenate([a[i] for a in self.accesses]) for i in (2, 3))
        order = np.argsort(addresses, kind="stable")
        kinds, programs, addresses, values = (
            x[order] for x in (kinds, programs, addresses, values)
        )
        places, begins = np.unique(addresses, return_index=True)

        def differ(x: np.ndarray) -> np.ndarray:
            return np.minimum.reduceat(x, begins) != np.maximum.reduceat(x, begins)

        least, most = (f.reduceat(kinds, begins) for f in (np.minimum, np.maximum))
        races = differ(programs) & (most != READ) & (least != ATOMIC)
        if one_value:
            races &= (least != WRITE) | (most != WRITE) | differ(values)
        if races.any():
            raise AssertionError(f"{races.sum()} races, of {self._named(places[races][0])}")

    def _named(self, address: int) -> str:
        """The argument that an address belongs to, and the programs that touch it."""
        kinds = ("read", "write", "atomic")
        bases = {
            int(argument.handle.data.item()): name
            for name, argument in self.arguments.items()
            if hasattr(argument, "handle") and argument.dtype.is_ptr()
        }
        base = max((base for base in bases if base <= address), default=0)
        touches = sorted({(p, kinds[k]) for k, p, where, _ in self.accesses if address in where})
        return f"byte {int(address) - base} of {bases.get(base)}: {touches[:8]}"


class _Kernel:
    """Stands in for a kernel's function, which the interpreter calls for one program at a time: the
    first call runs all of them."""

    def __init__(self, fn: Callable[..., None], run: Callable[..., None]) -> None:
        self.fn, self.run = fn, run
        self.operands: list[tuple[int, int]] = []
        # What the interpreter reads of a function.
        self.__name__, self.__signature__ = fn.__name__, signature(fn)
        self.__globals__, self.__annotations__ = fn.__globals__, fn.__annotations__

    def __call__(self, **arguments: Any) -> None:
        if not any(interpreter.interpreter_builder.grid_idx):
            self.run(self.fn, arguments, self.operands)


@contextmanager
def interleaved(seed: int, one_value: bool = False) -> Iterator[list[str]]:
    """Interleave the programs of each launch in the block, in an order that `seed` gives.

    Yields the names of the kernels that are launched. `one_value` allows several programs to write
    one element without an atomic as long as all write the same value.
    """
    chance = random.Random(seed)
    launched: list[str] = []
    launches: list[_Launch] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    init, copy_in = executor.__init__, executor._init_args_hst
    load, store = builder.create_masked_load, builder.create_masked_store
    exchange, compare = builder.create_atomic_rmw, builder.create_atomic_cas

    def run(
        fn: Callable[..., None], arguments: dict[str, Any], operands: list[tuple[int, int]]
    ) -> None:
        launched.append(fn.__name__)
        launches.append(_Launch(fn, arguments, operands, chance))
        launches[-1].run()
        launches[-1].check_races(one_value)

    def init_interleaved(self: Any, fn: Any, *rest: Any, **options: Any) -> None:
        init(self, fn, *rest, **options)
        self.fn = _Kernel(fn, run)

    def copy_in_and_note(self: Any, *arguments: Any) -> Any:
        positional, named = copy_in(self, *arguments)
        storages = [
            x.untyped_storage() for x in (*positional, *named.values()) if hasattr(x, "data_ptr")
        ]
        self.fn.operands = [(storage.data_ptr(), storage.nbytes()) for storage in storages]
        return positional, named

    def access_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].access(READ, pointers, mask)
        return load(self, pointers, mask, *rest)

    def access_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].access(WRITE, pointers, mask, value)
        return store(self, pointers, value, mask, *rest)

    def access_exchange(
        self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        launches[-1].access(ATOMIC, pointers, mask)
        return exchange(self, operation, pointers, value, mask, *rest)

    def access_compare(self: Any, pointers: Any, *rest: Any) -> Any:
        everywhere = interpreter.TensorHandle(np.ones(1, bool), interpreter.tl.int1)
        launches[-1].access(ATOMIC, pointers, everywhere)
        return compare(self, pointers, *rest)

    with (
        patch.object(executor, "__init__", init_interleaved),
        patch.object(executor, "_init_args_hst", copy_in_and_note),
        patch.object(builder, "create_masked_load", access_load),
        patch.object(builder, "create_masked_store", access_store),
        patch.object(builder, "create_atomic_rmw", access_exchange),
        patch.object(builder, "create_atomic_cas", access_compare),
    ):
        try:
            yield launched
        except BaseException as error:
            error.add_note(f"programs interleaved by seed {seed}")
            raise


@contextmanager
def last_program_alone() -> Iterator[None]:
    """Run the last program of each launch in the block and no other, so that a launch may be as
    large as it likes."""
    executor = interpreter.GridExecutor
    init, launch = executor.__init__, executor.__call__

    def run(fn: Callable[..., None], arguments: dict[str, Any], _: object) -> None:
        builder = interpreter.interpreter_builder
        builder.set_grid_idx(*(n - 1 for n in builder.grid_dim))
        fn(**arguments)
        raise _Abandoned

    def init_with_one(self: Any, fn: Any, *rest: Any, **options: Any) -> None:
        init(self, fn, *rest, **options)
        self.fn = _Kernel(fn, run)

    def launch_one(self: Any, *arguments: Any, **options: Any) -> None:
        with suppress(_Abandoned):
            launch(self, *arguments, **options)

    with (
        patch.object(executor, "__init__", init_with_one),
        patch.object(executor, "__call__", launch_one),
    ):
        yield
