"""How contestants are timed against each other.

Everything is measured here and now: the contestants run in turn, round after round (A B C, A B C,
…), so that a machine that is busy for a moment is busy for all of them. In its turn each runs twice
and the second call counts: the first finds the caches as another model left them, which no service
that runs one model ever does.

For the same reason each has a process of its own on a CPU, where they would share malloc's heap.
What one of them makes of it, all get: once a model is patched malloc keeps large blocks
(:mod:`encoder_fast.backends.heap`), for every other model of the process too. On a GPU all are in
this process, for one CUDA context is enough.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoder_fast.cli.checkpoint import Checkpoint
from encoder_fast.cli.errors import UserError, first_line
from encoder_fast.cli.measuring import Contestant, Timing

Inputs = Mapping[str, Tensor]

Runner = Callable[[Inputs], float]
"""A contestant, ready to run: from a batch to the seconds of the second of two forwards."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """How long a race is: at most ``most`` rounds and, after ``fewest``, at most ``seconds``."""

    most: int
    fewest: int
    seconds: float


@contextmanager
def ready(checkpoint: Checkpoint, contestants: Sequence[Contestant]) -> Iterator[dict[str, Runner]]:
    """Load all contestants, by label; they end with the context.

    Raises:
        UserError: one can't be loaded.
    """
    if torch.device(checkpoint.device).type != "cpu":
        yield {
            one.label: partial(second_call, checkpoint.contestant(one), one) for one in contestants
        }
        return
    with ExitStack() as stack:
        processes = [stack.enter_context(_Process(checkpoint.path, one)) for one in contestants]
        yield {process.label: process.loaded() for process in processes}


def race(runners: Mapping[str, Runner], inputs: Inputs, rounds: Rounds) -> list[Timing]:
    """Time each contestant on the same inputs, in turn."""
    for run in runners.values():
        # the first call prepares weights and compiles kernels
        run(inputs)
    seconds: dict[str, list[float]] = {label: [] for label in runners}
    deadline = time.perf_counter() + rounds.seconds
    for done in range(rounds.most):
        if done >= rounds.fewest and time.perf_counter() > deadline:
            break
        for label, run in runners.items():
            seconds[label].append(run(inputs))
    return [Timing(label, tuple(values)) for label, values in seconds.items()]


@torch.inference_mode()
def second_call(model: Callable[..., Any], one: Contestant, inputs: Inputs) -> float:
    """Seconds of the second of two forwards.

    Raises:
        UserError: it can't be compiled.
    """
    device = next(iter(inputs.values())).device
    try:
        model(**inputs)
        _synchronize(device)
        start = time.perf_counter()
        model(**inputs)
        _synchronize(device)
        return time.perf_counter() - start
    except Exception as error:
        if one.is_compiled and type(error).__module__.startswith("torch._"):
            raise UserError(f"--compile: {first_line(error)}") from error
        raise


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Process:
    """A contestant in a process of its own, which loads it at once."""

    def __init__(self, path: str, one: Contestant) -> None:
        self.label = one.label
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _ignore_interrupts)
        self._loading = self._pool.submit(_load, path, one, torch.get_num_threads())

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def loaded(self) -> Runner:
        self._result(self._loading)
        return self._run

    def _run(self, inputs: Inputs) -> float:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return self._result(self._pool.submit(_run_loaded, arrays))

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except BrokenProcessPool:
            message = "its process ended by itself; was there too little memory?"
            raise UserError(f"{self.label}: {message}") from None


# What follows runs in a contestant's process.

_loaded: Callable[[Inputs], float]


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal, and the one that started this one ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _load(path: str, one: Contestant, threads: int) -> None:
    global _loaded
    torch.set_num_threads(threads)
    _loaded = partial(second_call, Checkpoint(path, "").contestant(one), one)


def _run_loaded(arrays: Mapping[str, np.ndarray]) -> float:
    return _loaded({name: torch.from_numpy(array) for name, array in arrays.items()})
