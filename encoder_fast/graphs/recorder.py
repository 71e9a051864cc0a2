"""Recording what a function launches, and launching all of it again: the part that needs a GPU.

What is recorded are kernels with their arguments: addresses and numbers, as they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from encoder_fast.backends import load
from encoder_fast.errors import BackendUnavailableError


class Recording(Protocol):
    """A recorded function.

    Attributes:
        output: what it returned. Each replay of this or another recording of the same recorder may
            write over it.
    """

    output: Tensor

    def replay(self) -> None:
        """Launch everything again, on the current stream."""


class Recorder(Protocol):
    """Makes recordings that share their memory, so that only one may be used at a time."""

    def why_not_now(self) -> str | None:
        """Why nothing can be recorded or replayed in this call; ``None`` where it can."""

    def turn(self) -> AbstractContextManager[None]:
        """Around each use: it comes after all earlier ones, whatever streams they were on. Nobody
        else may be in a turn, which the caller sees to."""

    def record(self, run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Recording:
        """Record ``run``, which reads ``inputs`` and nothing else that changes its place. It is
        called twice and must not wait for the device. Only within a turn."""


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
    return CudaRecorder(device)


# PyTorch records one graph at a time in a process.
_recording = threading.Lock()


class CudaRecorder:
    """CUDA graphs of one device in one memory pool of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # For recording alone: PyTorch keeps a workspace of cuBLAS for each stream, and may drop it
        # with any graph that was recorded there. Made while a graph is recorded, it lies in the
        # pool, which stays as long as one of the graphs.
        self._stream = torch.cuda.Stream(device)
        self._last_turn = torch.cuda.Event()

    def why_not_now(self) -> str | None:
        with torch.cuda.device(self._device):
            capturing = torch.cuda.is_current_stream_capturing()
        return "the caller records a CUDA graph of its own" if capturing else None

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._last_turn)
            try:
                yield
            finally:
                self._last_turn.record(stream)

    def record(self, run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Recording:
        home = torch.cuda.current_stream()
        # Whatever happens once at a first launch, such as compiling a kernel or making a handle of
        # cuBLAS, can't be recorded. It belongs to the process or thread, not to the stream.
        run()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with work of theirs, unless they wait for the whole device.
        with (
            _recording,
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            output = run()
        return _CudaRecording(graph, output, inputs, home)


class _CudaRecording:
    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        output: Tensor,
        inputs: Sequence[Tensor],
        home: torch.cuda.Stream,
    ) -> None:
        self.output = output
        self._graph = graph
        self._inputs = inputs
        self._home = home

    def replay(self) -> None:
        stream = torch.cuda.current_stream()
        if stream != self._home:
            # Their memory must not go to somebody else on the other stream while this one reads it.
            for buffer in self._inputs:
                buffer.record_stream(stream)
        self._graph.replay()
