"""What was measured to be faster on which GPU: the table behind ``auto``.

``measurements.json`` has, for each architecture, op, dtype and shape class, the backend that won:

    {"sm_90": {"attention": {"float16": {"D64-S256": "cuda"}}}}

A shape class is the next larger size in ``SIZES`` or ``LENGTHS``: attention over heads of 64 and
sequences of up to 200 tokens is ``D64-S256``, LayerNorm of 700 columns ``N768``. The table holds
only what a record in ``bench/results/`` shows. What is not in it runs on ``triton``, but for the
ops in ``PREDICTED``.
"""

from __future__ import annotations

import functools
import json
from bisect import bisect_left
from pathlib import Path

import torch

LENGTHS = (32, 64, 128, 256, 384, 512, 1024, 2048, 4096, 8192)
SIZES = (128, 256, 384, 512, 768, 1024, 2048, 4096, 8192)

# What runs on ``cuda`` until a record says otherwise: counted from compiled code, a multiple faster
# than in Triton. docs/kernels/disentangled_attention.md has the figures.
PREDICTED = frozenset({"disentangled_attention"})

Table = dict[str, dict[str, dict[str, dict[str, str]]]]

TABLE: Table = json.loads(Path(__file__).with_suffix(".json").read_text())


def attention_class(head_size: int, max_seqlen: int) -> str:
    """The shape class of an attention over sequences of up to ``max_seqlen`` tokens."""
    return f"D{head_size}-S{_next(LENGTHS, max_seqlen)}"


def norm_class(width: int) -> str:
    """The shape class of a LayerNorm over rows of ``width``."""
    return f"N{_next(SIZES, width)}"


def winner(op: str, device: torch.device, dtype: torch.dtype, shape: str) -> str:
    """The backend for an op on a GPU."""
    by_dtype = TABLE.get(architecture(device), {}).get(op, {})
    unmeasured = "cuda" if op in PREDICTED else "triton"
    return by_dtype.get(str(dtype).removeprefix("torch."), {}).get(shape, unmeasured)


def faster_ops(device: torch.device) -> str:
    """The ops that run on ``cuda`` in some shape on this GPU, for a reader; empty for none."""
    ops = TABLE.get(architecture(device), {})
    return ", ".join(
        op
        for op, by_dtype in ops.items()
        if any("cuda" in by_shape.values() for by_shape in by_dtype.values())
    )


def predicted_ops(device: torch.device, needs: frozenset[str]) -> str:
    """The ops of an encoder that run on ``cuda`` on this GPU without a measurement of them there,
    for a reader; empty for none."""
    measured = TABLE.get(architecture(device), {})
    return ", ".join(sorted(needs & PREDICTED - set(measured)))


def _next(ladder: tuple[int, ...], size: int) -> int:
    return ladder[min(bisect_left(ladder, size), len(ladder) - 1)]


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's name for a GPU."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
