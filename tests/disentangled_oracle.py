"""Disentangled attention as DeBERTa computes it, step by step, and inputs to try it on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from encoder_fast.ops.disentangled_attention import make_row_of_distance
from encoder_fast.parity import compare


@dataclass(frozen=True)
class Problem:
    """One call. `q`, `k`, `v` have `lengths` tokens and then some that belong to no sequence."""

    q: Tensor
    k: Tensor
    v: Tensor
    pos_key: Tensor | None
    pos_query: Tensor | None
    row_of_distance: Tensor
    lengths: tuple[int, ...]
    scale: float

    @property
    def cu_seqlens(self) -> Tensor:
        ends = list(itertools.accumulate(self.lengths, initial=0))
        return torch.tensor(ends, dtype=torch.int32, device=self.q.device)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def arguments(self) -> tuple:
        """As every backend takes them."""
        return (
            *(self.q, self.k, self.v, self.pos_key, self.pos_query, self.row_of_distance),
            *(self.cu_seqlens, self.longest, self.scale),
        )

    def step_by_step(self, dtype: torch.dtype) -> Tensor:
        """Every sequence by itself, each step rounded to `dtype` as the original rounds it."""
        out = torch.zeros(self.q.shape, dtype=dtype, device=self.q.device)
        reach = len(self.row_of_distance) // 2
        for begin, end in itertools.pairwise(itertools.accumulate(self.lengths, initial=0)):
            q, k, v = (x[begin:end].to(dtype).transpose(0, 1) for x in (self.q, self.k, self.v))
            places = torch.arange(end - begin, device=self.q.device)
            distance = (places[:, None] - places[None, :]).clamp(-reach, reach)
            rows = self.row_of_distance[distance + reach].long().expand(len(q), -1, -1)
            scores = q @ (k * self.scale).mT
            if self.pos_key is not None:
                products = q @ self.pos_key.to(dtype).transpose(0, 1).mT
                scores = scores + products.gather(-1, rows) * self.scale
            if self.pos_query is not None:
                products = k @ self.pos_query.to(dtype).transpose(0, 1).mT
                scores = scores + products.gather(-1, rows.mT).mT * self.scale
            out[begin:end] = (scores.softmax(-1) @ v).transpose(0, 1)
        return out

    def check(self, out: Tensor) -> None:
        """Apply the parity rule to a result."""
        assert out.shape == self.q.shape and out.dtype == self.q.dtype and out.is_contiguous()
        exact, eager = self.step_by_step(torch.float64), self.step_by_step(self.q.dtype)
        row = compare("op", out, eager, exact)
        assert row.ok, row
        tail = out[sum(self.lengths) :]
        assert torch.equal(tail, torch.zeros_like(tail))


def problem(
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    *,
    heads: int = 2,
    head_dim: int = 32,
    terms: str = "c2p+p2c",
    span: int = 24,
    buckets: int = 24,
    max_distance: int = 60,
    tail: int = 3,
    device: str = "cpu",
) -> Problem:
    """Random inputs, NaN around the tokens and in those of no sequence.

    A span of 24 is shorter than most lengths of the tests, and its buckets turn logarithmic at 12.
    """
    total = sum(lengths)

    def table() -> Tensor:
        return torch.randn(2 * span, heads, head_dim).to(device=device, dtype=dtype)

    buffer = torch.full((64 + total + tail + 64, 3, heads, head_dim), float("nan"), dtype=dtype)
    buffer[64 : 64 + total] = torch.randn(total, 3, heads, head_dim).to(dtype)
    q, k, v = buffer.to(device)[64 : 64 + total + tail].unbind(1)
    has_key, has_query = "c2p" in terms, "p2c" in terms
    return Problem(
        q,
        k,
        v,
        table() if has_key else None,
        table() if has_query else None,
        make_row_of_distance(span, buckets, max_distance, torch.device(device)),
        lengths,
        (head_dim * (1 + has_key + has_query)) ** -0.5,
    )


def spread(one: Problem) -> Problem:
    """The same problem with v1's layout of q, k and v, and tables cut out of wider ones."""
    total, heads, head_dim = one.q.shape
    by_head = torch.stack((one.q, one.k, one.v), dim=2)
    q, k, v = by_head.view(total, heads, 3, head_dim).unbind(2)
    tables = []
    for table in (one.pos_key, one.pos_query):
        if table is not None:
            wide = torch.full((len(table), heads, 2 * head_dim), float("nan")).to(table)
            wide[:, :, :head_dim] = table
            table = wide[:, :, :head_dim]
        tables.append(table)
    return replace(one, q=q, k=k, v=v, pos_key=tables[0], pos_query=tables[1])
