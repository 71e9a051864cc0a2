"""Whether what an original forward calls by name is still the library's own code.

Functions of a module, methods of a class and entries of the library's tables of attention and mask
functions can be replaced under their names, by hand or by ``AttentionInterface.register``. The
engine calls none of them, so it has to look: as it does for forwards, at each change.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from encoder_fast.errors import NotFastError
from encoder_fast.families.family import has_own_call
from encoder_fast.families.origin import innermost, is_users_code
from encoder_fast.looks import are_same

# Where the arithmetic is. Of what else transformers' code calls, no number comes.
_READ = (
    "transformers.models.",
    "transformers.activations",
    "transformers.integrations.sdpa_attention",
    "transformers.masking_utils",
    "transformers.modeling_attn_mask_utils",
    "transformers.modeling_rope_utils",
    "transformers.pytorch_utils",
)

# What the engine's kernels replace of PyTorch.
_FUNCTIONAL = (
    *("embedding", "layer_norm", "linear", "scaled_dot_product_attention", "softmax"),
    *("gelu", "relu", "silu"),
)
_TORCH = ("bmm", "gather", "matmul", "tanh")


class Code:
    """What the forwards of some modules call by name.

    Attributes:
        dictionaries: where these names stand. As long as none of them was written to, nothing was
            replaced, but by a module's or a class's own attributes.
    """

    def __init__(self, model: nn.Module, modules: list[nn.Module]) -> None:
        self._modules = modules
        classes = dict.fromkeys(cls for one in (model, *modules) for cls in type(one).__mro__)
        self._classes = [cls for cls in classes if cls.__module__.startswith(_READ)]
        self._names: dict[tuple[int, str], dict[str, Any]] = {}
        self._tables: dict[tuple[int, str], list[dict[str, Any]]] = {}
        self._approved: list[Any] = []
        for cls in self._classes:
            self._follow(vars(cls).get("forward"))
            for _, function in _methods(cls):
                self._follow(function)
        for module, names in ((F, _FUNCTIONAL), (torch, _TORCH)):
            for name in names:
                self._names[id(module.__dict__), name] = module.__dict__
        spaces = {id(space): space for space in self._names.values()}
        tables = [mapping for table in self._tables.values() for mapping in table]
        self.dictionaries = [*spaces.values(), *tables]

    def _follow(self, value: Any) -> None:
        """Note the names that a function reads from its module, and what these read in turn."""
        function = inspect.unwrap(value) if isinstance(value, FunctionType) else value
        space = getattr(function, "__globals__", {})
        if not space.get("__name__", "").startswith(_READ):
            return
        for name in _names_in(function.__code__):
            if name not in space or (id(space), name) in self._names:
                continue
            self._names[id(space), name] = space
            found = space[name]
            tables = _tables_of(found)
            if tables:
                self._tables[id(space), name] = tables
            for table in tables:
                self._follow(table.get("eager"))
                self._follow(table.get("sdpa"))
            self._follow(found)

    def check(self, implementation: str | None) -> None:
        """
        Args:
            implementation: the name of the attention that the model was told to use.

        Raises:
            NotFastError: somebody's own code stands in the place of the library's.
        """
        found = list(self._read(implementation))
        values = [value for _, _, value in found]
        if not are_same(values, self._approved):
            for where, name, value in found:
                if is_users_code(value):
                    raise NotFastError(f"{where}{name} was replaced")
            for (_, name), home in self._names.items():
                if _is_another(home.get(name), name):
                    raise NotFastError(f"{home['__name__']}.{name} was replaced")
            for own_class in dict.fromkeys(map(type, self._modules)):
                _check_forward(own_class)
            for (space, name), tables in self._tables.items():
                if not are_same(list(_tables_of(self._names[space, name][name])), tables):
                    raise NotFastError(f"{name} was replaced")
            self._approved = values
        for module in self._modules:
            cls: Any = type(module)
            if has_own_call(module):
                raise NotFastError(f"what a call of a {cls.__name__} runs was replaced")
            own = _method_names(cls) & module.__dict__.keys()
            if own:
                raise NotFastError(f"{min(own)} of a {cls.__name__} was replaced")

    def _read(self, implementation: str | None) -> Iterator[tuple[str, str, Any]]:
        """What stands under each name now, and where."""
        for (_, name), space in self._names.items():
            yield f"{space['__name__']}.", name, space.get(name)
        for (_, name), tables in self._tables.items():
            for table in tables:
                yield name, f"[{implementation!r}]", table.get(implementation or "eager")
        for cls in self._classes:
            for name, function in _methods(cls):
                yield f"{cls.__name__}.", name, function


def _is_another(value: Any, name: str) -> bool:
    """Whether a library's own function stands under the name of another one."""
    if (
        isinstance(value, type)
        or not callable(value)
        or isinstance(value, torch.jit.ScriptFunction)
    ):
        return False
    return getattr(innermost(value), "__name__", name) != name


def _check_forward(cls: Any) -> None:
    """Raise where the forward is that of a class which is none of its bases."""
    owner, _, _ = innermost(cls.forward).__qualname__.rpartition(".")
    if owner and owner not in {base.__qualname__ for base in cls.__mro__}:
        raise NotFastError(f"the forward of {cls.__name__} was replaced")


def _tables_of(value: Any) -> list[dict[str, Any]]:
    """The dictionaries of a table of functions, for instance ``ALL_ATTENTION_FUNCTIONS``."""
    if isinstance(value, dict):
        return [value]
    names = ("_local_mapping", "_global_mapping")
    return [getattr(value, name) for name in names if hasattr(value, name)]


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _methods(cls: type) -> Iterable[tuple[str, Any]]:
    """A class's own methods but its forward, which is looked at by itself."""
    for name, value in vars(cls).items():
        function = getattr(value, "__func__", value)
        special = name == "forward" or name.startswith("__") or isinstance(function, type)
        if not special and callable(function):
            yield name, function


@functools.cache
def _method_names(cls: type) -> frozenset[str]:
    return frozenset(
        name
        for base in cls.__mro__
        if base.__module__.startswith((*_READ, "transformers.modeling_utils"))
        for name, _ in _methods(base)
    )
