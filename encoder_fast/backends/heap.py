"""Getting the same memory again from glibc's malloc in every layer and every call.

From a threshold on, malloc maps each block anew and unmaps it when it is freed, so that the kernel
zeroes its pages every time: 4,350 page faults a layer for Q, K and V of MiniLM and 3,900 tokens,
4% of the time. The threshold rises to the largest such block that was ever freed, up to 32 MB
(mallopt(3), M_MMAP_THRESHOLD), but a block as large as that one is mapped again.

What is kept for good must not come to lie among such blocks: a primitive of oneDNN's, made in the
middle of a layer, holds what is free below it, and with each number of tokens that was not there
before another hole is left that the next layers are too large for.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# malloc's own limit, and that less room for its header and alignment.
_LIMIT = 32 << 20
_LARGEST = _LIMIT - (16 << 10)

# malloc's own threshold in a new process, and its number in malloc.h.
_FIRST_THRESHOLD = 128 << 10
_M_MMAP_THRESHOLD = -3


@functools.cache
def keep_large_blocks() -> None:
    """Let malloc keep freed blocks of up to 32 MB for the next that asks, in this process.

    Frees one block of that size, once; its pages are never touched. A malloc other than glibc's,
    or one with a threshold of the user's own, does not mind.
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")


@contextmanager
def map_large_blocks() -> Iterator[None]:
    """Within the block, malloc maps blocks of 128 KB and more anew, each by itself, so that what
    stays pins no other; from then on it keeps them again. Slower, and for the whole process."""
    global _mapping
    # Before the first call to mallopt, after which no freed block changes a threshold.
    keep_large_blocks()
    set_threshold = _set_threshold()
    if set_threshold is None:
        yield
        return
    with _lock:
        _mapping += 1
        set_threshold(_FIRST_THRESHOLD)
    try:
        yield
    finally:
        with _lock:
            _mapping -= 1
            if _mapping == 0:
                set_threshold(_LIMIT)


# How many threads are within the block above.
_mapping = 0
_lock = threading.Lock()

# With one of these the user has chosen how malloc works, and keeps it.
_CHOICES = ("MMAP_THRESHOLD", "TRIM_THRESHOLD", "TOP_PAD", "MMAP_MAX")


@functools.cache
def _set_threshold() -> Callable[[int], object] | None:
    """``None`` where there is no glibc, or the user chose."""
    tunables = os.environ.get("GLIBC_TUNABLES", "").upper()
    if any(f"MALLOC_{c}_" in os.environ or f"MALLOC.{c}" in tunables for c in _CHOICES):
        return None
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.gnu_get_libc_version and libc.mallopt
    except (AttributeError, OSError, TypeError):  # another libc; no main program on Windows
        return None
    return functools.partial(mallopt, _M_MMAP_THRESHOLD)
