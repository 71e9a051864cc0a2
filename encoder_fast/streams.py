"""Buffers that one CUDA stream writes and others read, in order, without a wait of the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, cuda


class StreamOrder:
    """The order of reads and writes of some buffers on one GPU. Not safe to share between threads.

    Made by whoever has just written them for the first time, on the current stream. Some may be
    older, and not written: those are kept for whoever reads them.
    """

    @classmethod
    def of(cls, buffers: list[Tensor]) -> StreamOrder | None:
        """``None`` where there is nothing to keep in order: the buffers are on no GPU."""
        return cls(buffers) if buffers[0].device.type == "cuda" else None

    def __init__(self, buffers: list[Tensor]) -> None:
        self._buffers = buffers
        self._device = buffers[0].device
        self._told: set[cuda.Stream] = set()
        self._written = cuda.Event()
        stream = cuda.current_stream(self._device)
        self._tell_allocator(stream)
        self._mark_written(stream)

    def _mark_written(self, stream: cuda.Stream) -> None:
        self._written.record(stream)
        self._in_order = {stream}
        """The streams whose next work comes after the last write."""

    def _tell_allocator(self, stream: cuda.Stream) -> None:
        # It knows the stream that memory was made on; of all others it has to be told once, or it
        # gives the memory away while they still read it.
        if stream not in self._told:
            self._told.add(stream)
            for buffer in self._buffers:
                buffer.record_stream(stream)

    def before_reading(self) -> None:
        """What is launched next on the current stream may read the buffers."""
        stream = cuda.current_stream(self._device)
        if stream in self._in_order:
            return
        stream.wait_event(self._written)
        self._in_order.add(stream)
        self._tell_allocator(stream)

    def write(self, launch: Callable[[], None]) -> bool:
        """Let ``launch`` write the buffers on the current stream, after all reads so far.

        Returns:
            False, and nothing is launched, where somebody records a CUDA graph on a stream that has
            read them. Waiting for such a stream would make this one a part of that graph.
        """
        self.before_reading()
        stream = cuda.current_stream(self._device)
        reads = []
        for reader in self._in_order - {stream}:
            with cuda.stream(reader):
                if is_captured(self._device):
                    return False
            reads.append(reader.record_event())
        for read in reads:
            stream.wait_event(read)
        launch()
        self._mark_written(stream)
        return True


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded on the current stream of a device."""
    if device.type != "cuda":
        return False
    with cuda.device(device):
        return cuda.is_current_stream_capturing()
