"""How an op is registered and called: the same few lines for all of them.

A registered op has a fake implementation, so ``torch.compile`` traces it without a graph break,
and no autograd formula: these ops are for inference.

It checks all that its kernels rely on, whoever calls it: the public function leaves the checks to
it, and fills in what was left out. What ``cu_seqlens`` holds is checked on the CPU, for a GPU would
have to wait: there its dtype, shape, device and strides are. The engine calls ``run``, past the
checks: it makes its operands itself, and weights are looked at where they are prepared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from encoder_fast.backends import NAMES, load, why_not
from encoder_fast.backends.memory import checked_bounds, lacks_memory
from encoder_fast.errors import BackendUnavailableError

_LIBRARY = torch.library.Library("encoder_fast", "DEF")


class Operator:
    """``encoder_fast::<name>``; its last argument is the name of a backend."""

    def __init__(self, schema: str, check: Callable[..., None], fake: Callable[..., Any]) -> None:
        """
        Args:
            check: takes the arguments, and raises where shapes, strides, dtypes or devices don't
                fit the op or the backend. It must not read what tensors hold.
            fake: the fake implementation.
        """
        self.name = schema.split("(", 1)[0]
        self._check = check
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self._run_checked, "CompositeExplicitAutograd")

        def checked_fake(*arguments: Any) -> Any:
            check(*arguments)
            return fake(*arguments)

        torch.library.register_fake(f"encoder_fast::{self.name}", checked_fake, lib=_LIBRARY)
        self.dispatch: Callable[..., Any] = getattr(torch.ops.encoder_fast, self.name).default
        names = [argument.name for argument in self.dispatch._schema.arguments]
        self._tensors = [
            (place, name)
            for place, name in enumerate(names)
            if "Tensor" in str(self.dispatch._schema.arguments[place].type)
        ]
        self._cu_seqlens = names.index("cu_seqlens") if "cu_seqlens" in names else None
        self._max_seqlen = names.index("max_seqlen") if "max_seqlen" in names else None

    def _run_checked(self, *arguments: Any) -> Any:
        first, backend = arguments[0], arguments[-1]
        self._check(*arguments)
        _check_place(backend, first.device)
        for place, name in self._tensors:
            tensor = arguments[place]
            if tensor is not None and lacks_memory(tensor):
                raise ValueError(
                    f"{name} of shape {tuple(tensor.shape)} has no memory for its elements: its "
                    "storage was freed or made smaller"
                )
        if self._cu_seqlens is not None and first.device.type == "cpu" and backend not in _READERS:
            longest = None if self._max_seqlen is None else arguments[self._max_seqlen]
            checked_bounds(arguments[self._cu_seqlens], first.shape[0], longest)
        return self.run(*arguments)

    def run(self, *arguments: Any) -> Any:
        """What the engine calls: the backend itself, past the dispatcher, which takes longer than
        the smallest kernels."""
        return getattr(load(arguments[-1]), self.name)(*arguments[:-1])


# Backends that check lengths themselves, in the copy that they go by.
_READERS = ("cpu", "reference")

# What was found to run where. To ask what is installed takes longer than a small op.
_runs: set[tuple[str, torch.device]] = set()


def _check_place(backend: str, device: torch.device) -> None:
    """Raise unless a backend is known and runs on a device."""
    if (backend, device) in _runs:
        return
    known = (*NAMES, "measured")
    if backend not in known:
        raise ValueError(f"backend must be one of {known}, got {backend!r}")
    reason = why_not(backend, device)
    if reason is not None:
        raise BackendUnavailableError(reason)
    if device.type == "cuda":
        _runs.add((backend, device))


def check_cu_seqlens(cu_seqlens: Tensor, device: torch.device) -> None:
    """Raise ``ValueError`` unless these are contiguous int32 ``(B + 1,)`` on ``device``."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            "cu_seqlens must be int32 of shape (B + 1,), got "
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, the tokens on {device}")
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"cu_seqlens must be contiguous, got stride {cu_seqlens.stride()}")


def forbid_grad(op: str, *tensors: Tensor | None) -> None:
    """Raise where autograd would expect a gradient that the op can't give."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{op} is for inference and has no gradient: call it under torch.no_grad(), or detach "
            "its inputs"
        )


def check_dtype(op: str, backend: str, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` where a backend does not run an op, or not in a dtype."""
    if backend not in (*NAMES, "measured"):
        raise ValueError(f"backend must be one of {NAMES}, got {backend!r}")
    module = load(backend)
    if not hasattr(module, op):
        raise ValueError(f"backend {backend!r} has no {op}")
    # Only backends with ops of different dtypes have the second.
    known = getattr(module, "DTYPES_OF_OP", {}).get(op, module.DTYPES)
    if dtype not in known:
        raise ValueError(
            f"backend {backend!r} runs {', '.join(map(str, known))} in {op}, got {dtype}"
        )
