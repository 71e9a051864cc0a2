"""Where a patched encoder keeps its state, and where in what the user holds the model is."""

from __future__ import annotations

from typing import Any

from torch import nn

STATE = "_encoder_fast"
"""The attribute under which a patched encoder carries its state; it is no module and no buffer."""


def root_module(model: Any) -> nn.Module:
    """The module itself, or the one that a pipeline runs.

    Raises:
        TypeError: there is none.
    """
    if isinstance(model, nn.Module):
        return model
    inner = getattr(model, "model", None)
    if isinstance(inner, nn.Module):
        return inner
    got = repr(model) if isinstance(model, str | type) else f"a {type(model).__name__}"
    raise TypeError(f"model must be a loaded torch.nn.Module or transformers pipeline, got {got}")


def original_class(module: nn.Module) -> Any:
    """The class of a module, patched or not."""
    state = module.__dict__.get(STATE)
    return type(module) if state is None else state.original
