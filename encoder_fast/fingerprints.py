"""What tells that a tensor's bytes changed: runs of them, and a checksum of all."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from encoder_fast.backends import cpu_kernels

# A look takes this many runs of each tensor, of a cache line each.
SAMPLE_RUNS, RUN_BYTES = 4, 64


def _words(tensor: Tensor) -> Tensor:
    """The elements as integers of their size, ``(rows, columns)``; a view that sees later edits."""
    detached = tensor.detach()
    if not detached.is_contiguous():
        detached = detached.t()
    rows = detached.view(detached.shape[0] if detached.dim() == 2 else 1, -1)
    return rows.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


class Samples:
    """Short runs of elements, spread evenly over each of some tensors of one dtype, as they are.

    Holds views of the tensors, which see later edits and keep their memory alive.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._runs = [run for tensor in tensors for run in _runs_of(tensor)]
        self._bytes = torch.cat(self._runs)
        places = [(run.data_ptr(), run.numel() * run.element_size()) for run in self._runs]
        self._places = torch.tensor(places, dtype=torch.int64, device="cpu")

    def are_unchanged(self) -> bool:
        if cpu_kernels.compares_bytes():
            return cpu_kernels.same_bytes(self._places, self._bytes)
        return torch.equal(torch.cat(self._runs), self._bytes)


def _runs_of(tensor: Tensor) -> list[Tensor]:
    words = _words(tensor).view(-1)
    run = RUN_BYTES // words.element_size()
    step = max(run, words.numel() // SAMPLE_RUNS)
    return [words[i : i + run] for i in range(0, words.numel(), step)]


def checksum_of_all(tensors: list[Tensor]) -> int:
    return sum((index + 1) * _checksum_of(tensor) for index, tensor in enumerate(tensors))


@functools.cache
def _odd_numbers(count: int) -> Tensor:
    return torch.arange(count, device="cpu").mul_(2).add_(1)


def _checksum_of(tensor: Tensor) -> int:
    """A sum of all bytes that also depends on the order of rows and columns."""
    words = _words(tensor)
    width = 8 // words.element_size()
    if words.shape[1] % width == 0 and words.storage_offset() % width == 0:
        words = words.view(torch.int64)
    # Odd factors tell one row from another. Exchanged columns leave the rows' sums alone, but they
    # show in any row: a few are enough to see them.
    some_rows = words[:: max(1, words.shape[0] // 4)]
    row_factors, column_factors = (_odd_numbers(size) for size in words.shape)
    return int((words.sum(dim=1) * row_factors).sum() + (some_rows * column_factors).sum())
