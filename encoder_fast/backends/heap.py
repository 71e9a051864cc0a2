"""Getting the same memory again from glibc's malloc in every layer and every call.

From a threshold on, malloc maps each block anew and unmaps it when it is freed, so that the kernel
zeroes its pages every time: 4,350 page faults a layer for Q, K and V of MiniLM and 3,900 tokens,
4% of the time. The threshold rises to the largest such block that was ever freed, up to 32 MB
(mallopt(3), M_MMAP_THRESHOLD), but a block as large as that one is mapped again.
"""

from __future__ import annotations

import functools

import torch

# malloc's own limit, less room for its header and alignment.
_LARGEST = (32 << 20) - (16 << 10)


@functools.cache
def keep_large_blocks() -> None:
    """Let malloc keep freed blocks of up to 32 MB for the next that asks, in this process.

    Frees one block of that size, once; its pages are never touched. A malloc other than glibc's,
    or one with a threshold of the user's own, does not mind.
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")
