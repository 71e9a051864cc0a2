"""Peak memory of building something and running it once."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.machine import Machine


@dataclass
class Peak:
    """Filled when the block ends; ``None`` where the system does not tell."""

    added_bytes: int | None = None


@contextmanager
def peak_memory(machine: Machine) -> Iterator[Peak]:
    """What the block adds to the memory in use, at its highest.

    On a GPU by PyTorch's allocator: what others allocate is not counted. On Linux by the process's
    resident pages, so weights, buffers and an exporter's own copies all count.
    """
    peak = Peak()
    gc.collect()
    if machine.is_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before: int | None = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = _reset_resident_peak()
    yield peak
    if machine.is_gpu:
        torch.cuda.synchronize()
        after: int | None = torch.cuda.max_memory_allocated()
    else:
        after = _status("VmHWM")
    if before is not None and after is not None:
        peak.added_bytes = max(0, after - before)


def _reset_resident_peak() -> int | None:
    """Forget the highest number of resident pages so far; the number of now, in bytes."""
    try:
        # Pages that were freed but kept would hide what the block takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _status("VmRSS")


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None
