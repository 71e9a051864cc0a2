"""Where the user's own code sees what a module is given or returns.

A module of a library is known if it is the library's, whole: its class is, none of its methods was
replaced, no hook is on it, and what it calls goes token by token. Anything else is the user's own.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from encoder_fast.families.family import has_own_call, has_own_forward
from encoder_fast.families.origin import is_library_code
from encoder_fast.looks import are_same
from encoder_fast.patching.locate import original_class

SENTENCE = ("sentence_transformers.",)

_LIBRARIES = ("transformers.", "torch.", "peft.", "trl.", "accelerate.", *SENTENCE)

# They run ahead of the encoder, or are no part of a call.
_BESIDE = {"tokenize", "preprocess", "save", "load", "get_config_dict"}

# On an instance these are looked at by themselves; the last two are accelerate's.
_RUN_BY_CALL = ("forward", "_call_impl", "_compiled_call_impl", "_hf_hook", "_old_forward")

# Of torch.nn: what they give for a token depends on that token alone.
_TOKEN_BY_TOKEN = {
    *("Linear", "Dropout", "LayerNorm", "RMSNorm", "Identity", "Embedding"),
    *("GELU", "ReLU", "ReLU6", "LeakyReLU", "ELU", "SELU", "SiLU", "Mish", "Softplus"),
    *("Tanh", "Sigmoid", "Hardtanh", "Hardswish", "Hardsigmoid"),
    *("Sequential", "ModuleList", "ModuleDict", "ParameterDict", "ParameterList"),
    # A loss goes by its labels, which are looked at in each call.
    *("CrossEntropyLoss", "BCEWithLogitsLoss"),
}


def watcher_of(module: nn.Module, given: bool = False) -> str | None:
    """The user's own code that sees what a module returns, or what it is ``given`` as well: a hook,
    a forward set on the instance, or what a call runs around it."""
    watcher = _hook_on(module, given) or own_forward(module)
    if watcher is None and has_own_call(module):
        return f"the call of {original_class(module).__name__}"
    return watcher


def _hook_on(module: nn.Module, given: bool) -> str | None:
    hooks = list(module._forward_hooks.values())
    if given:
        hooks += module._forward_pre_hooks.values()
    if all(is_library_code(hook, _LIBRARIES) for hook in hooks):
        return None
    return f"a hook on {original_class(module).__name__}"


def own_forward(module: nn.Module) -> str | None:
    """A forward of the user's own that is set on an instance."""
    if not has_own_forward(module):
        return None
    forward = module.__dict__["forward"]
    hook = module.__dict__.get("_hf_hook")
    if (
        type(forward) is functools.partial
        and is_library_code(forward.func, ("accelerate.",))
        and type(hook).__module__.startswith("accelerate.")
    ):
        return None
    return f"the forward set on {original_class(module).__name__}"


def own_method(module: nn.Module) -> str | None:
    """Whether a module is none of sentence-transformers', or a method of it was replaced; in a
    report's words."""
    cls = original_class(module)
    if not cls.__module__.startswith(SENTENCE):
        return cls.__name__
    for name in module.__dict__:
        if name != "forward" and name not in _BESIDE and callable(getattr(cls, name, None)):
            return f"{name} set on {cls.__name__}"
    replaced = _replaced_method(cls)
    return None if replaced is None else f"{replaced} set on {cls.__name__}"


# What the classes had when they were read, and which of it is the user's own.
_read: weakref.WeakKeyDictionary[type, tuple[list[Any], str | None]] = weakref.WeakKeyDictionary()


def _replaced_method(cls: type) -> str | None:
    bases = [vars(base) for base in cls.__mro__ if base.__module__.startswith(SENTENCE)]
    values = [value for base in bases for value in base.values()]
    known = _read.get(cls)
    # To judge a method takes a hundred times as long as to see that it is the same.
    if known is None or not are_same(known[0], values):
        replaced = (name for base in bases for name, value in base.items() if _is_own(name, value))
        known = _read[cls] = values, next(replaced, None)
    return known[1]


def _is_own(name: str, value: Any) -> bool:
    function = value.fget if isinstance(value, property) else value
    function = getattr(function, "__func__", function)
    if name in _BESIDE or not callable(function) or isinstance(function, type):
        return False
    return not is_library_code(function, _LIBRARIES)


def unknown_parts(module: nn.Module) -> Iterator[tuple[str, bool]]:
    """What a module calls, below itself, that is not known to go token by token: its name in a
    report's words, and whether it is the user's own."""
    for name, value in module.__dict__.items():
        if callable(value) and name not in _RUN_BY_CALL:
            yield getattr(value, "__name__", type(value).__name__), True
    for part in module.children():
        yield from unknown_part(part)


def unknown_part(part: nn.Module) -> Iterator[tuple[str, bool]]:
    """The same of what a module calls, and of what that calls in turn."""
    for one in part.modules():
        cls = original_class(one)
        watcher = watcher_of(one, given=True)
        if watcher is not None:
            yield watcher, True
        if not is_library_code(cls.forward, _LIBRARIES):
            yield cls.__name__, True
        elif cls.__module__.startswith("torch.") and cls.__name__ not in _TOKEN_BY_TOKEN:
            yield cls.__name__, False
