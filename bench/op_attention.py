"""The ops of attention: whole, within a window, disentangled, and the rotary turn before it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from bench.op_case import Inputs, Op, OpCase, by_element, lengths_of, rows_moved
from bench.timing import Call
from encoder_fast.ops.attention import attention
from encoder_fast.ops.disentangled_attention import disentangled_attention, make_row_of_distance
from encoder_fast.ops.rotary import rotary, rotary_tables

WINDOW = 64
"""How far a query sees to either side in the windowed op: ModernBERT's local layers."""

# DeBERTa-v3's: 256 log buckets to either side, up to a distance of 512.
_SPAN, _BUCKETS, _FARTHEST = 256, 256, 512


def pad(case: OpCase, x: Tensor) -> tuple[Tensor, Tensor]:
    """``(total, ...)`` as ``(B, S, ...)``, and where the real tokens are, ``(B, S)``."""
    lengths = torch.tensor(case.workload.lengths, device=x.device)
    return pad_by(lengths, case.workload.longest, x)


def pad_by(lengths: Tensor, longest: int, x: Tensor) -> tuple[Tensor, Tensor]:
    valid = torch.arange(longest, device=x.device) < lengths[:, None]
    padded = x.new_zeros(len(lengths), longest, *x.shape[1:])
    padded[valid] = x
    return padded, valid


def _attention_inputs(case: OpCase, device: torch.device) -> Inputs:
    width = case.width
    shape = (case.workload.tokens, 3, width.heads, width.head_size)
    qkv = torch.randn(shape, device=device).to(case.dtype)
    return {"qkv": qkv, **lengths_of(case, device)}


def _attention_ours(inputs: Inputs, backend: str) -> Call:
    q, k, v = inputs["qkv"].unbind(1)
    cu_seqlens, longest = inputs["cu_seqlens"], inputs["longest"]
    return lambda: attention(q, k, v, cu_seqlens, longest, backend=backend)


def _attention_eager(inputs: Inputs, window: int | None = None) -> Tensor:
    """Text by text, so that it also serves as the float64 reference of ragged batches."""
    out = []
    bounds = [0]
    for length in inputs["lengths"]:
        bounds.append(bounds[-1] + length)
    for start, stop in pairwise(bounds):
        q, k, v = inputs["qkv"][start:stop].permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        if window is not None:
            place = torch.arange(stop - start, device=q.device)
            scores = scores.masked_fill((place[:, None] - place).abs() > window, float("-inf"))
        out.append((torch.softmax(scores, dim=-1) @ v).transpose(0, 1))
    return torch.cat(out)


def _attention_operations(case: OpCase) -> int:
    pairs = sum(length * length for length in case.workload.lengths)
    return 4 * pairs * case.width.hidden


def _window_ours(inputs: Inputs, backend: str) -> Call:
    q, k, v = inputs["qkv"].unbind(1)
    bounds, longest = inputs["cu_seqlens"], inputs["longest"]
    return lambda: attention(q, k, v, bounds, longest, window_size=WINDOW, backend=backend)


def _window_operations(case: OpCase) -> int:
    pairs = 0
    for length in case.workload.lengths:
        cut = max(0, length - 1 - WINDOW)  # in each corner, a triangle of pairs too far apart
        pairs += length * length - cut * (cut + 1)
    return 4 * pairs * case.width.hidden


def _disentangled_inputs(case: OpCase, device: torch.device) -> Inputs:
    width = case.width
    tables = {
        name: torch.randn(2 * _SPAN, width.heads, width.head_size, device=device).to(case.dtype)
        for name in ("pos_key", "pos_query")
    }
    rows = make_row_of_distance(_SPAN, _BUCKETS, _FARTHEST, device)
    return {**_attention_inputs(case, device), **tables, "rows": rows}


def _disentangled_ours(inputs: Inputs, backend: str) -> Call:
    q, k, v = inputs["qkv"].unbind(1)
    operands = (q, k, v, inputs["cu_seqlens"], inputs["longest"], inputs["rows"])
    tables = {name: inputs[name] for name in ("pos_key", "pos_query")}
    return lambda: disentangled_attention(*operands, **tables, backend=backend)


def _disentangled_eager(inputs: Inputs) -> Tensor:
    """On the padded batch, by gathering each position term, as transformers has it."""
    longest, rows = inputs["longest"], inputs["rows"]
    lengths = torch.tensor(inputs["lengths"], device=rows.device)
    padded, valid = pad_by(lengths, longest, inputs["qkv"])
    q, k, v = padded.permute(2, 0, 3, 1, 4)
    place = torch.arange(longest, device=rows.device)
    reach = rows.numel() // 2
    row = rows[(place[:, None] - place).clamp(-reach, reach) + reach].long()
    scores = q @ k.transpose(2, 3)
    row = row.expand(*scores.shape[:2], -1, -1)
    scores = scores + (q @ inputs["pos_key"].permute(1, 2, 0)).gather(3, row)
    by_key = (k @ inputs["pos_query"].permute(1, 2, 0)).gather(3, row.transpose(2, 3))
    scores = (scores + by_key.transpose(2, 3)) * (3 * q.shape[-1]) ** -0.5
    scores = scores.masked_fill(~valid[:, None, None, :], torch.finfo(scores.dtype).min)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)[valid]


def _disentangled_operations(case: OpCase) -> int:
    """Content scores, both position terms over the rows that a text reaches, weights times v."""
    width = case.width
    reached = sum(length * min(2 * _SPAN, 2 * length) for length in case.workload.lengths)
    return _attention_operations(case) + 4 * reached * width.hidden


def _rotary_inputs(case: OpCase, device: torch.device) -> Inputs:
    size = case.width.head_size
    frequencies = 1e4 ** -(torch.arange(0, size, 2, device=device) / size)
    places = torch.cat([torch.arange(n, device=device) for n in case.workload.lengths])
    cos, sin = rotary_tables(places, frequencies)
    return {**_attention_inputs(case, device), "cos": cos, "sin": sin}


def _rotary_ours(inputs: Inputs, backend: str) -> Call:
    # It works in place; others are to find the inputs as they were.
    qkv, cos, sin = inputs["qkv"].clone(), inputs["cos"], inputs["sin"]
    return lambda: rotary(qkv, cos, sin, backend=backend)[:, :2]


def _rotary_eager(inputs: Inputs) -> Tensor:
    x = inputs["qkv"][:, :2]
    cos, sin = (inputs[name][:, None, None, :].to(x.dtype) for name in ("cos", "sin"))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


ATTENTION_OPS: dict[str, Op] = {
    "attention": Op(
        inputs=_attention_inputs,
        ours=_attention_ours,
        eager=_attention_eager,
        moved=rows_moved(4),
        operations=_attention_operations,
        eager_races=False,
    ),
    "window_attention": Op(
        inputs=_attention_inputs,
        ours=_window_ours,
        eager=lambda inputs: _attention_eager(inputs, WINDOW),
        moved=rows_moved(4),
        operations=_window_operations,
        eager_races=False,
    ),
    "disentangled_attention": Op(
        inputs=_disentangled_inputs,
        ours=_disentangled_ours,
        eager=_disentangled_eager,
        moved=rows_moved(4),
        operations=_disentangled_operations,
    ),
    "rotary": Op(
        inputs=_rotary_inputs,
        ours=_rotary_ours,
        eager=_rotary_eager,
        moved=rows_moved(4),
        operations=by_element(6),
    ),
}
