"""What every call asks of a model's modules and weights, as cheaply as the host can tell.

By the extension ``encoder_fast._cpu`` where it is built, else in Python, which takes several times
as long. Answers are for comparisons with earlier ones alone.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn


def _load() -> Any:
    try:
        extension = importlib.import_module("encoder_fast._cpu")
    except ImportError:
        return None
    return extension if hasattr(extension, "are_quiet") else None


_extension = _load()

# PyTorch has it from 2.11 on.
_exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)

Edge = tuple[dict[str, Any], str, nn.Module, type, dict[str, Any], int]
"""The children of a parent, a name among them, the child, its class, its children, their number."""


def are_quiet(edges: list[Edge]) -> bool:
    """Whether modules are as they were read, and nothing on them wants to run: in eval mode, no
    hook of a forward, no forward of their own. False where nobody can tell cheaply."""
    return _extension is not None and _extension.are_quiet(edges)


def places_of(tensors: list[Tensor | None]) -> object:
    """Which memory each tensor is, and how it reads it; ``None`` stands for no tensor."""
    if _extension is not None and _exchange is not None:
        found = _extension.places_of(tensors, _exchange, nn.Parameter, Tensor)
        if found:
            return found
    return [
        None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype, type(t))
        for t in tensors
    ]


def versions_of(tensors: list[Tensor | None]) -> object | None:
    """How often autograd saw each tensor change; in a list with ``None`` for those where nobody
    counts, if there are any."""
    if _extension is not None:
        found = _extension.versions_of(tensors, torch.Tensor._version)
        if found:
            return found
    return [0 if t is None else None if t.is_inference() else t._version for t in tensors]


def is_in_doubt(versions: object) -> bool:
    """Whether :func:`versions_of` found a tensor that nobody counts the changes of."""
    return isinstance(versions, list) and None in versions
