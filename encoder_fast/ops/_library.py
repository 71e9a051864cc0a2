"""How an op is registered and called: the same few lines for all of them.

A registered op has a fake implementation, so ``torch.compile`` traces it without a graph break,
and no autograd formula: these ops are for inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from encoder_fast.backends import load

_LIBRARY = torch.library.Library("encoder_fast", "DEF")


class Operator:
    """``encoder_fast::<name>``; its last argument is the name of a backend."""

    def __init__(self, schema: str, fake: Callable[..., Any]) -> None:
        self.name = schema.split("(", 1)[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"encoder_fast::{self.name}", fake, lib=_LIBRARY)
        self.dispatch: Callable[..., Any] = getattr(torch.ops.encoder_fast, self.name).default

    def run(self, *arguments: Any) -> Any:
        """What the engine calls: the backend itself, past the dispatcher, which takes longer than
        the smallest kernels."""
        return getattr(load(arguments[-1]), self.name)(*arguments[:-1])


def forbid_grad(op: str, *tensors: Tensor | None) -> None:
    """Raise where autograd would expect a gradient that the op can't give."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{op} is for inference and has no gradient: call it under torch.no_grad(), or detach "
            "its inputs"
        )


def check_dtype(op: str, backend: str, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` where a backend does not run an op, or not in a dtype."""
    module = load(backend)
    if not hasattr(module, op):
        raise ValueError(f"backend {backend!r} has no {op}")
    # Only backends with ops of different dtypes have the second.
    known = getattr(module, "DTYPES_OF_OP", {}).get(op, module.DTYPES)
    if dtype not in known:
        raise ValueError(
            f"backend {backend!r} runs {', '.join(map(str, known))} in {op}, got {dtype}"
        )
