"""CUDA graphs without a GPU: streams, memory pools and captures, as far as a recorder sees them.

What is kept to, with the place in PyTorch 2.11 or in CUDA's documents that says so:

- ``torch.cuda.Stream`` is one of 32 a device and priority, in turn (c10/cuda/CUDAStream.cpp).
- What any thread launches on a stream that is being captured becomes a part of the graph, and
  nothing runs. Waiting for the whole device is then an error, and the capture is lost
  (CUDA programming guide, "Prohibited and unhandled operations").
- cuBLAS has a workspace for each thread's handle and each stream, which stays until it is cleared
  (ATen/cuda/CublasHandlePool.cpp). Made during a capture it lies in the capture's pool.
- A pool counts the graphs and captures that use it. At 0 its free memory can be given back, and the
  pool goes when nothing is left in it. Beginning a capture with a pool that is there at 0 is an
  assertion that fails (c10/cuda/CUDACachingAllocator.cpp, ``create_or_incref_pool``).
- Beginning a capture turns allocation to the pool before CUDA may refuse, and ending it turns it
  off after CUDA may have refused; a pool that is still turned to takes no other capture
  (ATen/cuda/CUDAGraph.cpp, ``beginAllocateToPool``).
- Beginning a capture puts the generator of random numbers into a mode in which it serves captures
  alone, and writes its state on the stream; ending one well takes it out again
  (ATen/cuda/CUDAGeneratorImpl.cpp, ``capture_prologue`` and ``capture_epilogue``).
- Later versions clear the workspaces of a graph's stream when the graph goes (pytorch#175276), turn
  allocation off in any case (pytorch#180395), don't count captures that failed (pytorch#190348) and
  have a mode of the generator for each capture.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@dataclass(eq=False)
class Pool:
    count: int = 0


@dataclass(eq=False)
class Workspace:
    pool: Pool | None
    allocated: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether a graph may go on writing to it: nobody else can have its memory."""
        return self.allocated or (self.pool is not None and self.pool.count > 0)


@dataclass(frozen=True)
class Stream:
    cuda_stream: int
    cuda: FakeCuda | None = field(default=None, compare=False, repr=False)

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, other: Stream) -> None:
        assert self.cuda is not None
        event = Event(self.cuda)
        event.record(other)
        self.wait_event(event)


class OutOfMemoryError(RuntimeError):
    pass


@dataclass
class FakeCuda:
    """``torch.cuda`` of one device.

    Attributes:
        is_later: a later version, by the last lines above.
        capture: makes what repeats, as a context, what ran within it; its ``replay()`` is called.
        refusals: errors by the call that raises them, one each time: ``capture_begin``,
            ``begun`` right behind it, ``capture_end`` and ``launch`` during a capture.
        stream_error: what the driver answers when asked for a stream; 0 is success.
        ran: what ran, in order: the stream and the kernels, those of a graph together.
        waits: streams, and those that they waited for.
    """

    is_later: bool = False
    capture: Callable[[], Any] | None = None
    refusals: dict[str, list[BaseException]] = field(default_factory=dict)
    stream_error: int = 0
    ran: list[tuple[Stream, list[str]]] = field(default_factory=list)
    waits: list[tuple[Stream, Stream]] = field(default_factory=list)
    graphs: int = 0

    def __post_init__(self) -> None:
        self._here = threading.local()
        self._next_stream = itertools.count()
        self._next_own_stream = itertools.count(1000)
        self._pools: dict[tuple[int, int], Pool] = {}
        self._turned_to: set[tuple[int, int]] = set()
        self._captures: dict[Stream, CUDAGraph] = {}
        self._workspaces: dict[tuple[int, Stream], Workspace] = {}
        self._next_pool = itertools.count(1)
        self._generator_captures = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the recorder looks for CUDA, it finds this one."""
        cuda = SimpleNamespace(
            Stream=lambda: Stream(1 + next(self._next_stream) % 32, self),
            ExternalStream=lambda handle, _device: Stream(handle, self),
            Event=lambda: Event(self),
            CUDAGraph=lambda: CUDAGraph(self),
            graph_pool_handle=lambda: (0, next(self._next_pool)),
            current_stream=self.current_stream,
            is_current_stream_capturing=lambda: self.current_stream() in self._captures,
            stream=self.stream,
            device=self.device,
            synchronize=self.synchronize,
            empty_cache=self.empty_cache,
        )
        internals = SimpleNamespace(_cuda_endAllocateToPool=self._end_allocate)
        fake = SimpleNamespace(
            cuda=cuda,
            _C=internals,
            OutOfMemoryError=OutOfMemoryError,
            zeros=lambda *_, device: self.launch("fill"),
        )
        self.Stream = cuda.Stream
        driver = SimpleNamespace(cuStreamCreate=self._create_stream)
        libraries = SimpleNamespace(
            CDLL=lambda name: {"libcuda.so.1": driver}[name],
            byref=ctypes.byref,
            c_void_p=ctypes.c_void_p,
        )
        monkeypatch.setattr("encoder_fast.graphs.recorder.torch", fake)
        monkeypatch.setattr("encoder_fast.graphs.recorder.ctypes", libraries)

    def _create_stream(self, handle: Any, flags: int) -> int:
        assert flags == 1, "a stream that waits for the default stream can't be captured beside it"
        if self.stream_error == 0:
            handle._obj.value = next(self._next_own_stream)
        return self.stream_error

    def current_stream(self) -> Stream:
        return getattr(self._here, "stream", Stream(0, self))

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._here.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._here.stream = before

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        assert device.index == 0
        yield

    def synchronize(self) -> None:
        if self._captures:
            for graph in self._captures.values():
                graph.is_lost = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def empty_cache(self) -> None:
        left = {workspace.pool for workspace in self._workspaces.values()}
        for handle, pool in list(self._pools.items()):
            if pool.count == 0 and pool not in left:
                del self._pools[handle]

    def clear_workspaces(self, stream: Stream | None = None) -> None:
        """As torch.compile does for its own graphs: of all streams."""
        for key, workspace in list(self._workspaces.items()):
            if stream is None or key[1] == stream:
                workspace.allocated = False
                del self._workspaces[key]
        self.empty_cache()

    def launch(self, kernel: str) -> None:
        """Launch a kernel on the current stream."""
        stream = self.current_stream()
        graph = self._captures.get(stream)
        if graph is None:
            self.ran.append((stream, [kernel]))
            return
        self._maybe_refuse("launch", graph)
        graph.kernels.append(kernel)

    def gemm(self) -> None:
        """The same of one of cuBLAS's, which has a workspace."""
        stream = self.current_stream()
        graph = self._captures.get(stream)
        key = threading.get_ident(), stream
        if key not in self._workspaces:
            self._workspaces[key] = Workspace(None if graph is None else graph.pool)
        if graph is not None:
            graph.workspaces.append(self._workspaces[key])
        self.launch("gemm")

    def _maybe_refuse(self, call: str, graph: CUDAGraph) -> None:
        if self.refusals.get(call):
            error = self.refusals[call].pop(0)
            # Running out of memory is the allocator's error; CUDA has seen none.
            graph.is_lost = not isinstance(error, OutOfMemoryError)
            raise error

    def _begin_allocate(self, handle: tuple[int, int]) -> Pool:
        pool = self._pools.get(handle)
        if pool is None:
            pool = self._pools[handle] = Pool()
        elif pool.count == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        pool.count += 1
        if handle in self._turned_to:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self._turned_to.add(handle)
        return pool

    def _end_allocate(self, device: int, handle: tuple[int, int]) -> None:
        assert device == 0
        if handle not in self._turned_to:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self._turned_to.remove(handle)

    @property
    def is_clean(self) -> bool:
        """Whether no capture is underway or left half ended."""
        return not self._captures and not self._turned_to and not self._generator_captures


class Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._recorded_on: Stream | None = None

    def record(self, stream: Stream) -> None:
        assert stream not in self._cuda._captures, "who waits for it becomes a part of the graph"
        self._recorded_on = stream

    def wait(self, stream: Stream) -> None:
        assert stream not in self._cuda._captures, "a graph can't wait for what is outside it"
        if self._recorded_on is not None:
            self._cuda.waits.append((stream, self._recorded_on))


class CUDAGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.kernels: list[str] = []
        self.workspaces: list[Workspace] = []
        self.is_lost = False
        self.pool: Pool | None = None
        self._cuda = cuda
        self._has_ended = False
        self._repeats: Any = None

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        cuda = self._cuda
        assert capture_error_mode == "thread_local"
        stream = cuda.current_stream()
        assert stream != Stream(0), "CUDA graphs must be captured on a non-default stream"
        cuda._generator_captures = not cuda.is_later
        self._handle = pool
        self.pool = cuda._begin_allocate(pool)
        cuda._maybe_refuse("capture_begin", self)
        assert stream not in cuda._captures
        cuda._captures[stream] = self
        self._stream = stream
        if cuda.capture is not None:
            self._repeats = cuda.capture()
            self._repeats.__enter__()
        cuda._maybe_refuse("begun", self)

    def capture_end(self) -> None:
        cuda = self._cuda
        if cuda.current_stream() not in cuda._captures:
            raise RuntimeError("operation not permitted on a stream that is not capturing")
        assert cuda.current_stream() == self._stream
        if self._repeats is not None:
            self._repeats.__exit__(None, None, None)
        del cuda._captures[self._stream]
        try:
            cuda._maybe_refuse("capture_end", self)
            if self.is_lost:
                raise RuntimeError("operation failed due to a previous error during capture")
        except RuntimeError:
            if cuda.is_later:
                cuda._end_allocate(0, self._handle)
            raise
        cuda._end_allocate(0, self._handle)
        cuda._generator_captures = False
        self._has_ended = True
        cuda.graphs += 1

    def replay(self) -> None:
        cuda = self._cuda
        assert self._has_ended
        assert all(workspace.is_ours for workspace in self.workspaces), "an illegal address"
        cuda.ran.append((cuda.current_stream(), self.kernels))
        if self._repeats is not None:
            self._repeats.replay()

    def __del__(self) -> None:
        if self.pool is not None and (self._has_ended or self._cuda.is_later):
            self.pool.count -= 1
        if self._has_ended and self._cuda.is_later:
            self._cuda.clear_workspaces(self._stream)


class Buffer:
    """A tensor that knows which streams keep it from being given away."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.streams.append(stream)
