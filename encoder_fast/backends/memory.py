"""What kernels that take addresses rely on: that memory is there, and that lengths fit it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def lacks_memory(tensor: Tensor) -> bool:
    """Whether elements of a tensor lie beyond its storage, as they do once that was freed.

    Its address is 0 then, which kernels would read as "not given".
    """
    if tensor.layout is not torch.strided:
        return False
    held = tensor.untyped_storage().nbytes()
    if tensor.is_contiguous():
        elements = tensor.numel()
    elif tensor.numel() == 0:
        return False
    else:
        elements = 1 + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
    return elements > 0 and (tensor.storage_offset() + elements) * tensor.element_size() > held


def checked_bounds(cu_seqlens: Tensor, total: int, max_seqlen: int | None = None) -> list[int]:
    """What ``cu_seqlens`` holds. Read once: another thread may write it meanwhile.

    Raises:
        ValueError: these are no sequences of ``total`` tokens, or one is longer than
            ``max_seqlen``.
    """
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if not bounds or bounds[0] != 0 or bounds[-1] > total or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens must begin with 0, never fall and end with {total} tokens at most, "
            f"got {_abridged(bounds)}"
        )
    longest = max(lengths, default=0)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(
            f"max_seqlen must be the longest sequence or more, got {max_seqlen} for one of "
            f"{longest} tokens"
        )
    return bounds


def _abridged(values: list[int], most: int = 20) -> str:
    return f"[{', '.join(map(str, values[:most]))}{', …' if len(values) > most else ''}]"
