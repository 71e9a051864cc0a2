"""Launches of our Triton kernels as the engine makes them, at the sizes of bench/cost/cases.py.

Where there is no card, `triton_compile.launches_of` calls these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.cost.sizes import HEADS, TOKENS, WINDOW
from encoder_fast.kernels import (
    add_layer_norm,
    attention,
    disentangled_attention,
    embed_layer_norm,
    gated,
    local_attention,
    rotary,
)

SCALE = 0.125
EPS = 1e-12


def plain(head_dim: int, lengths: Sequence[int]) -> None:
    for length in lengths:
        attention.attention(*_packed(head_dim, length), length, SCALE)


def uneven(head_dim: int) -> None:
    """Sequences of 96 tokens on average, the longest of 256."""
    attention.attention(*_packed(head_dim, 96), 256, SCALE)


def biased(head_dim: int, length: int) -> None:
    bias = torch.empty(HEADS, 257, dtype=torch.bfloat16)
    attention.attention(*_packed(head_dim, length), length, SCALE, bias)


def local(head_dim: int, length: int) -> None:
    local_attention.local_attention(*_packed(head_dim, length), length, SCALE, WINDOW)


def disentangled(head_dim: int, length: int) -> None:
    q, k, v, bounds = _packed(head_dim, length)
    table = _half(512, HEADS, head_dim)
    rows = torch.empty(2 * length - 1, dtype=torch.int32)
    disentangled_attention.disentangled_attention(
        q, k, v, table, table, rows, bounds, length, SCALE
    )


def norm_of_sum(width: int) -> None:
    x, vector = _half(TOKENS, width), _half(width)
    add_layer_norm.add_layer_norm(x, x, vector, vector, EPS, x_bias=vector)


def norm_of_embeddings(width: int) -> None:
    ids, vector = torch.empty(TOKENS, dtype=torch.int64), _half(width)
    word, position, token_type = (_half(rows, width) for rows in (30522, 512, 2))
    embed_layer_norm.embed_layer_norm(
        ids, ids, ids, word, position, token_type, vector, vector, EPS
    )


def gate(width: int) -> None:
    gated.gated(_half(TOKENS, 2 * width), "gelu")


def rotate(head_dim: int) -> None:
    angles = torch.empty(TOKENS, head_dim // 2)
    rotary.rotary(_half(TOKENS, 3, HEADS, head_dim), angles, angles)


def _half(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def _packed(head_dim: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v as views of one product, and the bounds of sequences of that length."""
    q, k, v = _half(TOKENS, 3, HEADS, head_dim).unbind(1)
    return q, k, v, torch.empty(TOKENS // length + 1, dtype=torch.int32)
