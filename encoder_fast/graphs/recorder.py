"""Recording what a function launches, and launching all of it again: the part that needs a GPU.

What is recorded are kernels with their arguments: addresses and numbers, as they were. Whose memory
they are, and on which streams, is told in docs/architecture.md.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from encoder_fast.backends import load
from encoder_fast.errors import BackendUnavailableError


class RecordingFailedError(Exception):
    """Why nothing was recorded. Internal: the call runs kernel by kernel instead."""


class Recording(Protocol):
    """A recorded function.

    Attributes:
        output: what it returned. Each replay of this or another recording of the same recorder may
            write over it.
    """

    output: Tensor

    def replay(self) -> None:
        """Launch everything again, on the current stream. Only within a turn."""


class Recorder(Protocol):
    """Makes recordings that share their memory, so that only one may be used at a time."""

    def why_not_now(self) -> str | None:
        """Why nothing can be recorded or replayed in this call; ``None`` where it can."""

    def turn(self) -> AbstractContextManager[None]:
        """Around each use of a recording: one at a time, after all earlier ones, whatever streams
        they were on."""

    def record(self, run: Callable[[], Tensor], reads: Sequence[Tensor]) -> Recording:
        """Record ``run``, which is called twice, at first as an ordinary call, and must not wait
        for the device.

        Args:
            reads: what ``run`` reads or writes that was made for this recording or may be dropped
                with it.

        Raises:
            RecordingFailedError: nothing was recorded, and all else is as before.
        """


def recorder_for(backend: str, device: torch.device) -> Recorder:
    """The recorder of a device.

    Raises:
        BackendUnavailableError: it has no graphs, or the backend waits for the host and so can't be
            recorded.
    """
    if device.type != "cuda" or not getattr(load(backend), "RECORDABLE", False):
        raise BackendUnavailableError(
            "cuda_graphs=True needs backend 'triton' or 'cuda' on an NVIDIA GPU; the model is on "
            f"{device} with backend {backend!r}"
        )
    return _recorder_of(device)


@functools.cache
def _recorder_of(device: torch.device) -> Recorder:
    return CudaRecorder(device)


# PyTorch records one graph at a time in a process.
_recording = threading.Lock()

# A recording that did not end keeps its memory for good: cuBLAS's workspace, 32 MiB on Hopper, and
# what lies between layers. So after so many of them nothing more is recorded on that GPU.
_MOST_ABANDONED = 8


class CudaRecorder:
    """The CUDA graphs of a device: all encoders share a memory pool and a stream to record on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._turn = threading.Lock()
        self._last_turn = torch.cuda.Event()
        # Where graphs are recorded; made when needed. A workspace of cuBLAS belongs to a stream.
        # Made while something is recorded it lies in the pool, where nobody else gets its memory.
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        # PyTorch 2.11 refuses a pool that no graph uses any more while the workspace is still in
        # it. So the last graph stays, also when its encoder has dropped it.
        self._last_graph: torch.cuda.CUDAGraph | None = None
        self._abandoned = 0

    def why_not_now(self) -> str | None:
        with torch.cuda.device(self._device):
            capturing = torch.cuda.is_current_stream_capturing()
        return "the caller records a CUDA graph of its own" if capturing else None

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._turn, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._last_turn)
            try:
                yield
            finally:
                self._last_turn.record(stream)

    def record(self, run: Callable[[], Tensor], reads: Sequence[Tensor]) -> Recording:
        if self._abandoned >= _MOST_ABANDONED:
            raise RecordingFailedError(f"{self._abandoned} others did not end on this GPU")
        with torch.cuda.device(self._device):
            try:
                # Whatever happens once at a first launch, such as compiling a kernel or making
                # a handle of cuBLAS, can't be recorded. It belongs to the process or thread, not to
                # the stream.
                run()
                graph, output = self._capture_with_room(run)
            except Exception as error:
                raise RecordingFailedError(f"{type(error).__name__}: {error}") from error
            return _CudaRecording(graph, output, reads)

    def _capture_with_room(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Not in a turn: others may go on replaying, as nothing runs here.
        with _recording, _without_collector():
            with suppress(torch.OutOfMemoryError):
                return self._capture(run)
            # While something is recorded, PyTorch can't give unused memory back to make room.
            torch.cuda.empty_cache()
            return self._capture(run)

    def _capture(
        self, run: Callable[[], Tensor], *, after_failure: bool = False
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if self._stream is None:
            self._stream = _new_stream(self._device)
            self._pool = torch.cuda.graph_pool_handle()
        graph, home, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), self._stream
        # Nothing of ours runs there. But PyTorch 2.11 begins by writing the state of random numbers
        # that graphs of the caller may be reading.
        stream.wait_stream(home)
        try:
            # Not by `torch.cuda.graph`: it waits for the device, which breaks what other threads
            # record, and leaves this thread on the stream when a recording fails to begin or end.
            with torch.cuda.stream(stream):
                try:
                    # Other threads may go on with work of theirs, unless they wait for the device.
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    output = run()
                except BaseException:
                    # Also where it has not begun, or nobody knows. The end may fail too, and would
                    # say less.
                    with suppress(RuntimeError):
                        self._end(graph)
                    raise
                self._end(graph)
        except BaseException:
            if self._last_graph is not graph:
                self._abandon()
                if not after_failure:
                    # PyTorch 2.11 refuses random numbers until a recording has ended well.
                    with suppress(RuntimeError):
                        self._capture(self._one_kernel, after_failure=True)
            raise
        home.wait_stream(stream)
        return graph, output

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        graph.capture_end()
        self._last_graph = graph

    def _one_kernel(self) -> Tensor:
        return torch.zeros(1, device=self._device)

    def _abandon(self) -> None:
        """Record somewhere else from now on: a recording that did not end leaves the pool in
        a state that differs by version. Graphs that are there keep it."""
        self._stream = self._last_graph = None
        self._abandoned += 1
        # As long as PyTorch takes it for recording, memory that was used on several streams is
        # never free again.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep garbage for later: what its finalisers do would be a part of the recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody else has, for the life of the process. PyTorch's own are 32 a device,
    handed out in turn: sooner or later a user gets the same one, and what they launch there while
    a graph is recorded would become a part of it."""
    stream, non_blocking = ctypes.c_void_p(), 1
    error = ctypes.CDLL("libcuda.so.1").cuStreamCreate(ctypes.byref(stream), non_blocking)
    if error:
        raise RuntimeError(f"cuStreamCreate failed with error {error}")
    return torch.cuda.ExternalStream(stream.value, device)


class _CudaRecording:
    def __init__(
        self, graph: torch.cuda.CUDAGraph, output: Tensor, reads: Sequence[Tensor]
    ) -> None:
        self.output = output
        self._graph = graph
        self._reads = reads
        self._told: set[torch.cuda.Stream] = set()

    def replay(self) -> None:
        stream = torch.cuda.current_stream()
        if stream not in self._told:
            # What is read must not go to somebody else on the stream that it was made on.
            self._told.add(stream)
            for buffer in self._reads:
                buffer.record_stream(stream)
        self._graph.replay()
