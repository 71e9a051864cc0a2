"""``patch``, ``unpatch`` and ``patched``: the public way in and out.

A patched encoder is the same object with another class: a subclass of its own class, of the same
name, that tries the fast path in its ``forward``. Keys, hooks, ``isinstance``, ``save_pretrained``
and pickling stay as they were, and no other model of that class is touched.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from encoder_fast.errors import UnsupportedModelError
from encoder_fast.families import find_family, unsupported
from encoder_fast.patching.reporting import STATE
from encoder_fast.patching.state import NOT_FAST, EncoderState

M = TypeVar("M")


def patch(model: M, backend: str = "auto", *, strict: bool = False) -> M:
    """Make the encoders inside a model run fast, in place.

    Args:
        model: a supported Hugging Face encoder, bare or with a head; or any ``nn.Module`` or
            transformers pipeline that holds one.
        backend: ``auto`` (by device), ``cpu``, ``triton`` or ``reference``. One asked for by name
            never gives way to another.
        strict: raise :class:`~encoder_fast.FallbackError` where a call would run the original
            forward, instead of running and counting it.

    Returns:
        The same object. Patching it again replaces the options and starts the counts anew.

    Raises:
        UnsupportedModelError: it holds no supported encoder, or one in a configuration that has no
            fast path. Nothing is changed then.
        BackendUnavailableError: the backend can't run where the model is. Nothing is changed.
        ValueError: no backend of that name.
    """
    found: list[tuple[nn.Module, EncoderState]] = []
    modules = dict(root_module(model).named_modules())
    for path, module in modules.items():
        original = _original_class(module)
        family = find_family(original)
        if family is None:
            continue
        parent = modules[path.rpartition(".")[0]]
        head_reads_first = type(parent).__name__ in family.first_token_heads
        state = EncoderState(family, original, backend, strict, head_reads_first)
        try:
            if "forward" in module.__dict__:
                raise UnsupportedModelError("its forward was replaced on the instance")
            state.read(module)
        except UnsupportedModelError as error:
            where = f"{original.__name__}{f' at {path}' if path else ''}"
            raise UnsupportedModelError(f"{where}: {error}. Nothing was changed.") from None
        found.append((module, state))
    if not found:
        raise unsupported(root_module(model))
    for module, state in found:
        module.__dict__[STATE] = state
        module.__class__ = _fast_class(state.original)
    return model


def unpatch(model: M) -> M:
    """Give a model its original forward back, bit for bit. Harmless where nothing is patched."""
    for module in root_module(model).modules():
        state = module.__dict__.pop(STATE, None)
        if state is not None:
            module.__class__ = state.original
    return model


@contextmanager
def patched(model: M, backend: str = "auto", *, strict: bool = False) -> Iterator[M]:
    """Patch for the length of a ``with`` block; what was patched before is so again after it."""
    before = {
        module: module.__dict__[STATE]
        for module in root_module(model).modules()
        if STATE in module.__dict__
    }
    patch(model, backend, strict=strict)
    try:
        yield model
    finally:
        unpatch(model)
        for module, state in before.items():
            module.__dict__[STATE] = state
            module.__class__ = _fast_class(state.original)


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
    raise TypeError(f"expected a torch.nn.Module or a pipeline, got {type(model).__name__}")


def _original_class(module: nn.Module) -> Any:
    state = module.__dict__.get(STATE)
    return type(module) if state is None else state.original


@functools.cache
def _fast_class(original: Any) -> Any:
    """The subclass that patched instances of ``original`` get; one for each class."""
    original_forward = original.forward

    @functools.wraps(original_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(STATE)
        if state is not None:
            output = state.attempt(self, args, kwargs)
            if output is not NOT_FAST:
                return output
        return original_forward(self, *args, **kwargs)

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        # A pickle holds the model as it was before: it loads without encoder_fast. The usual
        # constructor of pickles insists on the object's own class, which this is not to be.
        state = {key: value for key, value in self.__dict__.items() if key != STATE}
        return object.__new__, (original,), state

    def deepcopy(self: nn.Module, memo: dict) -> nn.Module:
        # A copy of a patched model is patched.
        clone = fast.__new__(fast)
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__dict__, memo))
        return clone

    namespace = {
        "forward": forward,
        "__reduce_ex__": reduce_ex,
        "__deepcopy__": deepcopy,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    fast = type(original)(original.__name__, (original,), namespace)
    return fast
