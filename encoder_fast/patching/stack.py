"""Watching the modules whose arithmetic the engine takes over.

The engine reads weights and calls none of these modules. So a hook, an adapter, a replaced layer,
a replaced forward or training mode on one of them must be seen before each call. What a module
keeps in plain attributes, its family knows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from encoder_fast.errors import NotFastError
from encoder_fast.families import Family
from encoder_fast.families.family import has_own_forward
from encoder_fast.looks import (
    Edge,
    Watch,
    are_quiet,
    are_same,
    have_places,
    have_versions,
    places_of,
    versions_of,
)

# transformers leaves these on layers once attentions were asked for; they do nothing on their own.
_HARMLESS_HOOKS = "transformers.utils.output_capturing"


class Stack:
    """The subtree under some children of a model, and the facts of its family, as they were when it
    was read.

    Attributes:
        watch: tells when something about them may have changed.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self._edges: list[Edge] = []
        self._forwards: dict[Any, Any] = {}
        for name in family.stack:
            self._add(model, name)
        self._family = family
        self._beside = _beside(model)
        beside = [one for one in self._beside if one is not None]
        modules = [child for _, _, child, *_ in self._edges]
        self.watch = Watch(model, modules + beside)
        self._facts = family.facts(model)
        # A buffer that a module gets later is none that was read.
        self._with_buffers = [module for module in modules if module._buffers]
        self._buffers = self._its_buffers()
        self._places, self._versions = places_of(self._buffers), versions_of(self._buffers)
        self._approved: object = None

    def _its_buffers(self) -> list[Tensor | None]:
        return [buffer for module in self._with_buffers for buffer in module._buffers.values()]

    def _add(self, parent: nn.Module, name: str) -> None:
        child = parent._modules.get(name)
        if child is None:
            return
        cls: Any = type(child)
        children = child._modules
        self._edges.append((parent._modules, name, child, cls, children, len(children)))
        self._forwards[cls] = cls.forward
        for grandchild in child._modules:
            self._add(child, grandchild)

    def is_unchanged(self, model: nn.Module) -> bool:
        """Whether everything is still what was read.

        Raises:
            NotFastError: something on a module wants to run or to be seen.
        """
        mark = self.watch.look(model)
        if mark is not self._approved:
            if not (
                self._holds_same_modules()
                and are_same(self._beside, _beside(model))
                and self._facts == self._family.facts(model)
                and are_same(self._its_buffers(), self._buffers)
            ):
                return False
            self._approved = mark
        return have_places(self._buffers, self._places) and have_versions(
            self._buffers, self._versions
        )

    def _holds_same_modules(self) -> bool:
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            raise NotFastError("global module hooks are registered")
        for cls, forward in self._forwards.items():
            if cls.forward is not forward:
                return False
        if are_quiet(self._edges):
            return True
        for siblings, name, child, cls, children, count in self._edges:
            if siblings.get(name) is not child or type(child) is not cls:
                return False
            if len(children) != count:
                return False
            state = child.__dict__
            if (
                state["training"]
                or state["_forward_pre_hooks"]
                or state["_forward_hooks"]
                or "forward" in state
            ):
                _object(name, child)
        return True


def _beside(model: Any) -> list[Any]:
    """What the facts of a family are read from beside the stack."""
    return [model.config, getattr(model, "pooler", None)]


def _object(name: str, child: nn.Module) -> None:
    """Raise unless what stands out about a module is harmless."""
    state, cls = child.__dict__, type(child)
    if state["training"]:
        raise NotFastError(f"training mode ({name} is in it; call model.eval())")
    if state["_forward_pre_hooks"] or _has_user_hook(state["_forward_hooks"]):
        raise NotFastError(f"a hook on {cls.__name__} inside the stack")
    if has_own_forward(child):
        raise NotFastError(f"the forward of a {cls.__name__} inside the stack was replaced")


def _has_user_hook(hooks: dict) -> bool:
    return any(getattr(hook, "__module__", None) != _HARMLESS_HOOKS for hook in hooks.values())
