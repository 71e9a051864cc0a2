"""What the attention kernels are held against: a float64 softmax of every sequence by itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from encoder_fast.backends.triton import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

HEAD_DIMS = (16, 32, 64, 96, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Scores held at a time, 256 MiB of them in float64: several workers share a GPU.
_MOST_SCORES = 1 << 25


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty gives NaN, so that a row of an output left out by mistake shows."""
    empty = torch.empty

    def empty_of_nan(*size: object, **options: object) -> Tensor:
        return empty(*size, **options).fill_(float("nan"))  # type: ignore[call-overload]

    with patch.object(torch, "empty", empty_of_nan):
        yield


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def cumulated(lengths: tuple[int, ...]) -> Tensor:
    ends = list(itertools.accumulate(lengths, initial=0))
    return torch.tensor(ends, dtype=torch.int32, device=DEVICE)


def random_qkv(total: int, tail: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """(total + tail, 3, H, D), NaN in the tail and in 64 rows to either side of the view."""
    buffer = torch.full((64 + total + tail + 64, 3, heads, head_dim), float("nan"), dtype=dtype)
    buffer[64 : 64 + total] = torch.randn(total, 3, heads, head_dim).to(dtype)
    return buffer.to(DEVICE)[64 : 64 + total + tail]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    dtype: torch.dtype,
    window_size: int | None = None,
    relative_bias: Tensor | None = None,
) -> Tensor:
    """Every sequence by itself, each step in `dtype`; zeros for the rows behind the last."""
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    for begin, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        b_q, b_k, b_v = (x[begin:end].to(dtype).transpose(0, 1) for x in (q, k, v))
        index = torch.arange(end - begin, device=q.device)
        for rows in index.split(max(1, _MOST_SCORES // max(1, b_k[..., 0].numel()))):
            scores = b_q[:, rows] @ b_k.transpose(1, 2) * scale
            distance = index[None, :] - rows[:, None]
            if relative_bias is not None:
                reach = relative_bias.shape[1] // 2
                scores += relative_bias.to(dtype)[:, distance.clamp(-reach, reach) + reach]
            if window_size is not None:
                scores = scores.masked_fill(distance.abs() > window_size, float("-inf"))
            out[begin + rows] = (scores.softmax(-1) @ b_v).transpose(0, 1)
    return out


def assert_as_good_as_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    scale: float | None = None,
    window_size: int | None = None,
    relative_bias: Tensor | None = None,
) -> None:
    scale = q.shape[2] ** -0.5 if scale is None else scale
    options = {"window_size": window_size, "relative_bias": relative_bias}
    out = attention(q, k, v, cumulated(lengths), max(lengths, default=0), scale, **options)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()

    reference = softmax_attention(q, k, v, lengths, scale, torch.float64, **options)
    eager = softmax_attention(q, k, v, lengths, scale, q.dtype, **options).double()
    largest = reference.abs().max().item() if reference.numel() else 0.0
    _, exponent = torch.frexp(torch.tensor(largest))
    rounding_step = torch.finfo(q.dtype).eps * 2.0 ** (exponent.item() - 1) if largest else 0.0
    error = (out.double() - reference).abs()
    bound = 2 * (eager - reference).abs().max().item() + rounding_step if largest else 0.0
    # A NaN compares as false, so it fails here too.
    assert bool((error <= bound).all()), f"error {error.max().item():.3e}, bound {bound:.3e}"

    tail = out[sum(lengths) :]
    assert torch.equal(tail, torch.zeros_like(tail))
