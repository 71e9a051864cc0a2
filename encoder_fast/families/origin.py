"""Whose code a function is: a library's, or a user's in its place.

A function's home is the module that it was compiled in. ``functools.wraps`` gives a replacement the
name and ``__module__`` of what it replaces, but not that. A decorator of a library proves nothing
either, since users decorate their own functions by it. So everything that a function holds and may
call has to be a library's: what it wraps, its closure, a partial's arguments, a method's object.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import nn

MODELS = ("transformers.", "torch.nn.")

_LIBRARIES = {
    *("transformers", "torch", "flash_attn", "sentence_transformers"),
    *("accelerate", "peft", "trl", "encoder_fast", "typing_extensions"),
    # Its mocks call whatever they are given.
    *(sys.stdlib_module_names - {"unittest"}),
}

# Around a library's function it gives other numbers.
_CHANGES_NUMBERS = "torch.amp."

_known: weakref.WeakKeyDictionary[FunctionType, bool] = weakref.WeakKeyDictionary()


def is_library_code(function: Any, libraries: tuple[str, ...] = MODELS) -> bool:
    """Whether a function, below all its decorators, is one of ``libraries``, and nothing that
    it holds is a user's."""
    return _home(innermost(function)).startswith(libraries) and not is_users_code(function)


def is_users_code(value: Any) -> bool:
    """Whether a call of ``value`` may run a user's code."""
    if not isinstance(value, FunctionType):
        return _holds_users_code(value, set())
    # Weakly: a hook's closure may hold a model.
    known = _known.get(value)
    if known is None:
        known = _known[value] = _holds_users_code(value, set())
    return known


def _holds_users_code(value: Any, seen: set[int]) -> bool:
    # What a class or a module computes is looked at by itself, where one of them stands.
    if isinstance(value, type | nn.Module) or not callable(value) or id(value) in seen:
        return False
    seen.add(id(value))
    home = _home(value)
    if home.partition(".")[0] not in _LIBRARIES or home.startswith(_CHANGES_NUMBERS):
        return True
    return any(_holds_users_code(held, seen) for held in _held_by(value))


def _held_by(value: Any) -> Iterator[Any]:
    """What a callable holds that it may call."""
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield value.__func__
        own = value.__self__
        # A class method, as `apply` of an autograd.Function, calls what the class defines.
        yield from vars(own).values() if isinstance(own, type) else (own,)
    else:
        yield getattr(value, "__wrapped__", None)
        for cell in getattr(value, "__closure__", None) or ():
            try:
                yield cell.cell_contents
            except ValueError:  # nothing is in it yet
                continue
        if not isinstance(value, FunctionType):
            yield from getattr(value, "__dict__", {}).values()


def innermost(function: Any) -> Any:
    """What is below all decorators."""
    while True:
        if isinstance(function, MethodType):
            function = function.__func__
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif isinstance(function, functools.partial):
            function = function.func
        else:
            return function


def _home(value: Any) -> str:
    space = getattr(value, "__globals__", None)
    if space is None:
        return type(value).__module__
    return space.get("__name__", "")
