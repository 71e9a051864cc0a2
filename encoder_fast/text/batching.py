"""Batches by tokens: how many a batch may hold, and what happens when memory runs out.

Nothing is padded, so the work of a batch is its tokens, and their number is what is bounded. Rows
go by length, the longest first: a batch that does not fit is then met at the beginning, and rows of
one length are neighbours, which the CPU's attention takes in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

T = TypeVar("T")

# On the CPU the speed is flat from some 1,000 tokens on; more only takes memory.
CPU_TOKENS = 4096

# A GPU is busy from some ten thousand tokens on.
GPU_TOKENS = 65536


class TokenBudget:
    """How many tokens a batch may hold; smaller after each time that memory ran out."""

    def __init__(self, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"max_tokens_per_batch must be at least 1, got {tokens}")
        self.tokens = tokens

    @classmethod
    def automatic(cls, model: nn.Module) -> TokenBudget:
        """By the device and, on a GPU, by the memory that is free."""
        parameter = next(model.parameters())
        if parameter.device.type != "cuda":
            return cls(CPU_TOKENS)
        config: Any = model.config
        # Two hidden states, Q, K, V and their context, the feed-forward's inner features before
        # and after the activation; half of what is free is left to others.
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        per_token = (6 * config.hidden_size + 2 * inner) * parameter.element_size()
        free, _ = torch.cuda.mem_get_info(parameter.device)
        return cls(max(1, min(GPU_TOKENS, free // 2 // per_token)))

    def run(
        self, lengths: np.ndarray, compute: Callable[[np.ndarray], T]
    ) -> Iterator[tuple[np.ndarray, T]]:
        """Compute all rows, batch by batch.

        Args:
            lengths: the tokens of each row.
            compute: from the rows of a batch, given by their numbers, to its result.

        Yields:
            The rows of each batch and its result. A row longer than the budget is a batch by
            itself. When memory runs out the budget is halved and the same rows are tried again;
            that of a single row is the caller's problem, and raised.
        """
        order = np.argsort(-lengths, kind="stable")
        ends = lengths[order].cumsum()
        first = 0
        while first < len(order):
            done = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + self.tokens, side="right")))
            rows = order[first:last]
            result = self._try(compute, rows)
            if result is not None:
                yield rows, result
                first = last
                continue
            self.tokens = max(1, int(ends[last - 1] - done) // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _try(self, compute: Callable[[np.ndarray], T], rows: np.ndarray) -> T | None:
        try:
            return compute(rows)
        except (RuntimeError, MemoryError) as error:
            if len(rows) == 1 or not is_out_of_memory(error):
                raise
            return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # the CPU allocator, cuBLAS and a kernel's launch raise a plain RuntimeError
    said = ("can't allocate memory", "ALLOC_FAILED", "out of memory")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
