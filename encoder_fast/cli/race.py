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
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
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
    """A contestant in a process of its own, which loads it at once.

    Either side sees the end of the other as the end of the pipe.
    """

    def __init__(self, path: str, one: Contestant) -> None:
        self.label = one.label
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, path, one, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._connection.close()
        if error is not None:
            # it may be in the midst of something long
            self._process.kill()
        self._process.join()

    def loaded(self) -> Runner:
        self._receive()
        return self._run

    def _run(self, inputs: Inputs) -> float:
        try:
            self._connection.send({name: tensor.numpy() for name, tensor in inputs.items()})
        except OSError:
            raise self._ended() from None
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ended(self) -> UserError:
        return UserError(f"{self.label}: its process ended by itself; was there too little memory?")


def _serve(connection: Connection, path: str, one: Contestant, threads: int) -> None:
    """What a contestant's process does: load, and run what it is sent until nothing more comes."""
    # Ctrl-C reaches every process of a terminal; the one that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        model = Checkpoint(path, "").contestant(one)
    except Exception as error:
        connection.send(_portable(error))
        return
    connection.send(None)
    while True:
        try:
            arrays: Mapping[str, np.ndarray] = connection.recv()
        except EOFError:
            return
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        try:
            answer: object = second_call(model, one, inputs)
        except Exception as error:
            answer = _portable(error)
        connection.send(answer)


def _portable(error: Exception) -> Exception:
    """The error, or where its class can't be made anew in another process what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {first_line(error)}")
    return error
