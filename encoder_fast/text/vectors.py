"""From the vectors of windows to those of texts, and to the form that was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from encoder_fast.text.chunking import Window

PRECISIONS = ("float32", "int8", "binary")


@dataclass(frozen=True, slots=True)
class Chunks:
    """The windows of long texts, each with a vector: what a search over passages is built on.

    Attributes:
        vectors: ``(M, D)``.
        text: int64 ``(M,)``, the index of the text that each was cut from.
        start, stop: int64 ``(M,)``, its first character in that text and the one after its last.
    """

    vectors: np.ndarray
    text: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.text)


def whole_texts(vectors: Tensor, windows: list[Window], pooling: str) -> Tensor:
    """One vector a text from those of its windows.

    The mean of the windows weighted by their own tokens, each of which counts once however many
    windows see it; with ``max`` pooling, the maximum of the windows, which is that of all tokens.
    """
    texts = torch.tensor([window.text for window in windows], device=vectors.device)
    number = len(texts.unique())
    if number == len(windows):
        return vectors
    if pooling == "max":
        index = texts[:, None].expand_as(vectors)
        out = vectors.new_zeros(number, vectors.shape[1])
        return out.scatter_reduce_(0, index, vectors, "amax", include_self=False)
    # a text without a token still has a window
    weights = vectors.new_tensor([max(1, window.weight) for window in windows])
    totals = weights.new_zeros(number).index_add_(0, texts, weights)
    shares = weights / totals[texts]
    out = vectors.new_zeros(number, vectors.shape[1])
    return out.index_add_(0, texts, vectors * shares[:, None])


@dataclass(frozen=True, slots=True)
class Finish:
    """The last steps of a vector, in sentence-transformers' order.

    Attributes:
        by_model: the model itself normalises.
        truncate_dim: how many values are kept; all where ``None``.
        normalize: normalise what is left.
    """

    by_model: bool
    truncate_dim: int | None
    normalize: bool

    def __call__(self, vectors: Tensor) -> np.ndarray:
        if self.by_model:
            vectors = F.normalize(vectors, dim=-1)
        vectors = vectors[:, : self.truncate_dim]
        if self.normalize:
            vectors = F.normalize(vectors, dim=-1)
        return np.ascontiguousarray(vectors.numpy())


def quantise(
    vectors: np.ndarray, precision: str, ranges: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Float32 vectors in fewer bits, as sentence-transformers does it.

    ``int8`` divides each dimension's range into 256 steps; ``binary`` keeps the signs, eight to a
    byte.

    Args:
        ranges: the lowest and the highest value of each dimension; of these vectors where ``None``.

    Raises:
        ValueError: ``int8`` with a single vector, which has no range.
    """
    if precision == "binary":
        return (np.packbits(vectors > 0, axis=-1).astype(np.int16) - 128).astype(np.int8)
    if precision == "float32" or len(vectors) == 0:
        return vectors.astype(np.int8 if precision == "int8" else np.float32, copy=False)
    if ranges is None:
        if len(vectors) == 1:
            raise ValueError("precision='int8' needs more than one text: it scales by their range")
        ranges = vectors.min(axis=0), vectors.max(axis=0)
    low, high = ranges
    steps = (high - low) / 255
    steps[steps == 0] = 1
    levels = np.clip(np.floor((vectors - low) / steps), 0, 255)
    return (levels - 128).astype(np.int8)
