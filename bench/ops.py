"""The ops under test."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.op_attention import ATTENTION_OPS
from bench.op_case import (
    EPS,
    VOCABULARY,
    Inputs,
    Op,
    OpCase,
    by_element,
    lengths_of,
    rows_moved,
    vectors,
)
from bench.roofs import dtype_name
from bench.timing import Call
from encoder_fast.ops import linear
from encoder_fast.ops.add_layer_norm import add_layer_norm
from encoder_fast.ops.embed_layer_norm import embed_layer_norm
from encoder_fast.ops.pool import pool


def _norm_inputs(case: OpCase, device: torch.device) -> Inputs:
    shape = (case.workload.tokens, case.width.hidden)
    x, residual = (torch.randn(shape, device=device).to(case.dtype) for _ in range(2))
    return {"x": x, "residual": residual, **vectors(case, device, "weight", "bias")}


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
    return (tokens * (hidden + inner) + hidden * inner) * case.dtype.itemsize


def _feed_forward_inputs(case: OpCase, device: torch.device) -> Inputs:
    hidden, inner = case.width.hidden, case.width.inner
    x = torch.randn(case.workload.tokens, hidden, device=device)
    w_in = torch.randn(2 * inner, hidden, device=device) * hidden**-0.5
    w_out = torch.randn(hidden, inner, device=device) * inner**-0.5
    return {k: v.to(case.dtype) for k, v in (("x", x), ("w_in", w_in), ("w_out", w_out))}


def _feed_forward_ours(inputs: Inputs, backend: str) -> Call:
    prepared = linear.prepare_feed_forward(
        inputs["w_in"], None, inputs["w_out"], None, "gelu", True, backend
    )
    return lambda: linear.run_feed_forward(inputs["x"], prepared, "gelu", backend)


def _feed_forward_eager(inputs: Inputs) -> Tensor:
    features, gate = F.linear(inputs["x"], inputs["w_in"]).chunk(2, dim=-1)
    return F.linear(F.gelu(features) * gate, inputs["w_out"])


def _feed_forward_moved(case: OpCase) -> int:
    hidden, inner = case.width.hidden, case.width.inner
    return (2 * case.workload.tokens + 3 * inner) * hidden * case.dtype.itemsize


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
        **vectors(case, device, "weight", "bias"),
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
    return {"x": x.to(case.dtype), **lengths_of(case, device)}


def _pool_eager(inputs: Inputs) -> Tensor:
    wide = inputs["x"] if inputs["x"].dtype == torch.float64 else inputs["x"].float()
    return torch.stack([part.mean(dim=0) for part in wide.split(inputs["lengths"])])


def _pool_moved(case: OpCase) -> int:
    read = case.workload.tokens * case.width.hidden * case.dtype.itemsize
    return read + case.workload.batch * case.width.hidden * 4


OPS: dict[str, Op] = {
    **ATTENTION_OPS,
    "add_layer_norm": Op(
        inputs=_norm_inputs,
        ours=_norm_ours,
        eager=_norm_eager,
        moved=rows_moved(3),
        operations=by_element(10),
    ),
    "linear": Op(
        inputs=_linear_inputs,
        ours=_linear_ours,
        eager=lambda i: F.gelu(F.linear(i["x"], i["weight"], i["bias"])),
        moved=_linear_moved,
        operations=lambda case: 2 * case.workload.tokens * case.width.hidden * case.width.inner,
    ),
    "gated_feed_forward": Op(
        inputs=_feed_forward_inputs,
        ours=_feed_forward_ours,
        eager=_feed_forward_eager,
        moved=_feed_forward_moved,
        operations=lambda case: 6 * case.workload.tokens * case.width.hidden * case.width.inner,
    ),
    "embed_layer_norm": Op(
        inputs=_embed_inputs,
        ours=_embed_ours,
        eager=_embed_eager,
        moved=rows_moved(2),
        operations=by_element(10),
    ),
    "pool": Op(
        inputs=_pool_inputs,
        ours=lambda i, backend: partial(pool, i["x"], i["cu_seqlens"], "mean", backend=backend),
        eager=_pool_eager,
        eager_races=False,
        moved=_pool_moved,
        operations=by_element(1),
    ),
}


def facts_of(case: OpCase) -> dict[str, Any]:
    """What a record says of a case."""
    op, workload = OPS[case.op], case.workload
    return {
        "op": case.op,
        "width": case.width.name,
        "heads": case.width.heads,
        "head_size": case.width.head_size,
        "dtype": dtype_name(case.dtype),
        "workload": workload.name,
        "tokens": workload.tokens,
        "padding": round(workload.padding, 3),
        "bytes": op.moved(case),
        "operations": op.operations(case),
    }
