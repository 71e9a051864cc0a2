"""The ops under test: their inputs, their work, and how they are written in plain PyTorch.

Each function of an :class:`Op` takes the inputs of one call. ``eager`` is both the first peer and,
on float64 inputs, the reference that everybody is checked against. All results are packed,
``(total, ...)``; peers in :mod:`bench.op_peers` bring theirs into that form for the check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.roofs import dtype_name
from bench.timing import Call
from bench.workloads import Workload
from encoder_fast.ops import linear
from encoder_fast.ops.add_layer_norm import add_layer_norm
from encoder_fast.ops.attention import attention
from encoder_fast.ops.embed_layer_norm import embed_layer_norm
from encoder_fast.ops.pool import pool

Inputs = dict[str, Any]
EPS = 1e-12
VOCABULARY = 30522


@dataclass(frozen=True, slots=True)
class Width:
    """The sizes of a model's layer."""

    name: str
    heads: int
    head_size: int
    inner: int

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size


WIDTHS = {
    "minilm": Width("minilm", 12, 32, 1536),
    "base": Width("base", 12, 64, 3072),
    "large": Width("large", 16, 64, 4096),
    "tiny": Width("tiny", 2, 16, 64),
}


@dataclass(frozen=True, slots=True)
class OpCase:
    """One op on one batch in one dtype."""

    op: str
    width: Width
    workload: Workload
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.op} {self.width.name} {self.workload.name} {dtype_name(self.dtype)}"

    def facts(self) -> dict[str, Any]:
        op, workload = OPS[self.op], self.workload
        return {
            "op": self.op,
            "width": self.width.name,
            "heads": self.width.heads,
            "head_size": self.width.head_size,
            "dtype": dtype_name(self.dtype),
            "workload": workload.name,
            "tokens": workload.tokens,
            "padding": round(workload.padding, 3),
            "bytes": op.moved(self),
            "operations": op.operations(self),
        }


@dataclass(frozen=True, slots=True)
class Op:
    """An operation.

    Attributes:
        inputs: new random ones for a case on a device.
        ours: our op on a backend by name, as the engine calls it; weights are made ready before.
        eager: plain PyTorch, in the dtype of the inputs.
        eager_races: ``eager`` is how people write the op, and so a peer.
        moved: bytes that have to be read and written, each once.
        operations: floating point operations, a multiplication and an addition counted as two.
    """

    inputs: Callable[[OpCase, torch.device], Inputs]
    ours: Callable[[Inputs, str], Call]
    eager: Callable[[Inputs], Tensor]
    moved: Callable[[OpCase], int]
    operations: Callable[[OpCase], int]
    eager_races: bool = True


def to_double(inputs: Inputs) -> Inputs:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _itemsize(case: OpCase) -> int:
    return case.dtype.itemsize


def _vectors(case: OpCase, device: torch.device, *names: str) -> Inputs:
    """Weights and biases of the hidden size, as far from 1 and 0 as trained ones are."""
    size = case.width.hidden
    return {
        name: (torch.randn(size, device=device) * 0.1 + (name == "weight")).to(case.dtype)
        for name in names
    }


def _lengths(case: OpCase, device: torch.device) -> Inputs:
    bounds = torch.tensor([0, *case.workload.lengths]).cumsum(0).to(torch.int32)
    return {
        "lengths": case.workload.lengths,
        "cu_seqlens": bounds.to(device),
        "longest": max(case.workload.lengths),
    }


def _attention_inputs(case: OpCase, device: torch.device) -> Inputs:
    width = case.width
    shape = (case.workload.tokens, 3, width.heads, width.head_size)
    qkv = torch.randn(shape, device=device).to(case.dtype)
    return {"qkv": qkv, **_lengths(case, device)}


def _attention_ours(inputs: Inputs, backend: str) -> Call:
    q, k, v = inputs["qkv"].unbind(1)
    cu_seqlens, longest = inputs["cu_seqlens"], inputs["longest"]
    return lambda: attention(q, k, v, cu_seqlens, longest, backend=backend)


def _attention_eager(inputs: Inputs) -> Tensor:
    """Text by text, so that it also serves as the float64 reference of ragged batches."""
    out = []
    bounds = [0]
    for length in inputs["lengths"]:
        bounds.append(bounds[-1] + length)
    for start, stop in pairwise(bounds):
        q, k, v = inputs["qkv"][start:stop].permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        out.append((torch.softmax(scores, dim=-1) @ v).transpose(0, 1))
    return torch.cat(out)


def _attention_operations(case: OpCase) -> int:
    pairs = sum(length * length for length in case.workload.lengths)
    return 4 * pairs * case.width.hidden


def _norm_inputs(case: OpCase, device: torch.device) -> Inputs:
    shape = (case.workload.tokens, case.width.hidden)
    x, residual = (torch.randn(shape, device=device).to(case.dtype) for _ in range(2))
    return {"x": x, "residual": residual, **_vectors(case, device, "weight", "bias")}


def _norm_ours(inputs: Inputs, backend: str) -> Call:
    operands = [inputs[name] for name in ("x", "residual", "weight", "bias")]
    return lambda: add_layer_norm(*operands, EPS, backend=backend)


def _norm_eager(inputs: Inputs) -> Tensor:
    x = inputs["x"] + inputs["residual"]
    return F.layer_norm(x, x.shape[-1:], inputs["weight"], inputs["bias"], EPS)


def _linear_inputs(case: OpCase, device: torch.device) -> Inputs:
    hidden, inner = case.width.hidden, case.width.inner
    x = torch.randn(case.workload.tokens, hidden, device=device)
    weight = torch.randn(inner, hidden, device=device) * hidden**-0.5
    bias = torch.randn(inner, device=device) * 0.1
    return {k: v.to(case.dtype) for k, v in (("x", x), ("weight", weight), ("bias", bias))}


def _linear_ours(inputs: Inputs, backend: str) -> Call:
    prepared = linear.prepare([inputs["weight"]], [inputs["bias"]], backend)
    return lambda: linear.run(inputs["x"], prepared, "gelu", backend)


def _linear_moved(case: OpCase) -> int:
    tokens, hidden, inner = case.workload.tokens, case.width.hidden, case.width.inner
    return (tokens * (hidden + inner) + hidden * inner) * _itemsize(case)


def _embed_inputs(case: OpCase, device: torch.device) -> Inputs:
    hidden, total = case.width.hidden, case.workload.tokens
    rows = {"word": VOCABULARY, "position": 512, "token_type": 2}
    tables = {k: torch.randn(n, hidden, device=device).to(case.dtype) for k, n in rows.items()}
    positions = [i % 512 for length in case.workload.lengths for i in range(length)]
    return {
        "input_ids": torch.randint(0, VOCABULARY, (total,), device=device),
        "position_ids": torch.tensor(positions, device=device),
        "token_type_ids": torch.zeros(total, dtype=torch.int64, device=device),
        **tables,
        **_vectors(case, device, "weight", "bias"),
    }


def _embed_ours(inputs: Inputs, backend: str) -> Call:
    ids_and_tables = ("input_ids", "word", "position_ids", "position", "token_type_ids")
    operands = [inputs[name] for name in (*ids_and_tables, "token_type", "weight", "bias")]
    return lambda: embed_layer_norm(*operands, EPS, backend=backend)


def _embed_eager(inputs: Inputs) -> Tensor:
    x = F.embedding(inputs["input_ids"], inputs["word"])
    x = x + F.embedding(inputs["token_type_ids"], inputs["token_type"])
    x = x + F.embedding(inputs["position_ids"], inputs["position"])
    return F.layer_norm(x, x.shape[-1:], inputs["weight"], inputs["bias"], EPS)


def _pool_inputs(case: OpCase, device: torch.device) -> Inputs:
    x = torch.randn(case.workload.tokens, case.width.hidden, device=device)
    return {"x": x.to(case.dtype), **_lengths(case, device)}


def _pool_eager(inputs: Inputs) -> Tensor:
    wide = inputs["x"] if inputs["x"].dtype == torch.float64 else inputs["x"].float()
    return torch.stack([part.mean(dim=0) for part in wide.split(inputs["lengths"])])


def _pool_moved(case: OpCase) -> int:
    read = case.workload.tokens * case.width.hidden * _itemsize(case)
    return read + case.workload.batch * case.width.hidden * 4


def _rows_moved(rows: int) -> Callable[[OpCase], int]:
    """So many rows of the hidden size for each token."""
    return lambda case: rows * case.workload.tokens * case.width.hidden * _itemsize(case)


def _by_element(count: int) -> Callable[[OpCase], int]:
    """So many operations for each element of the hidden state."""
    return lambda case: count * case.workload.tokens * case.width.hidden


OPS: dict[str, Op] = {
    "attention": Op(
        inputs=_attention_inputs,
        ours=_attention_ours,
        eager=_attention_eager,
        eager_races=False,
        moved=_rows_moved(4),
        operations=_attention_operations,
    ),
    "add_layer_norm": Op(
        inputs=_norm_inputs,
        ours=_norm_ours,
        eager=_norm_eager,
        moved=_rows_moved(3),
        operations=_by_element(10),
    ),
    "linear": Op(
        inputs=_linear_inputs,
        ours=_linear_ours,
        eager=lambda i: F.gelu(F.linear(i["x"], i["weight"], i["bias"])),
        moved=_linear_moved,
        operations=lambda case: 2 * case.workload.tokens * case.width.hidden * case.width.inner,
    ),
    "embed_layer_norm": Op(
        inputs=_embed_inputs,
        ours=_embed_ours,
        eager=_embed_eager,
        moved=_rows_moved(2),
        operations=_by_element(10),
    ),
    "pool": Op(
        inputs=_pool_inputs,
        ours=lambda i, backend: partial(pool, i["x"], i["cu_seqlens"], "mean", backend=backend),
        eager=_pool_eager,
        eager_races=False,
        moved=_pool_moved,
        operations=_by_element(1),
    ),
}
