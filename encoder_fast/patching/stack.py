"""Watching the modules whose arithmetic the engine takes over.

The engine reads weights and calls none of these modules. So a hook, an adapter, a replaced layer,
a replaced forward or training mode on one of them must be seen before each call; this costs a
fraction of a microsecond a module. What a module keeps in plain attributes, its family knows.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from encoder_fast.errors import NotFastError
from encoder_fast.looks import Edge, are_quiet

# transformers leaves these on layers once attentions were asked for; they do nothing on their own.
_HARMLESS_HOOKS = "transformers.utils.output_capturing"


class Stack:
    """The subtree under some children of a model, as it was when it was read."""

    def __init__(self, model: nn.Module, children: tuple[str, ...]) -> None:
        self._edges: list[Edge] = []
        self._forwards: dict[Any, Any] = {}
        for name in children:
            self._watch(model, name)

    def _watch(self, parent: nn.Module, name: str) -> None:
        child = parent._modules.get(name)
        if child is None:
            return
        cls: Any = type(child)
        children = child._modules
        self._edges.append((parent._modules, name, child, cls, children, len(children)))
        self._forwards[cls] = cls.forward
        for grandchild in child._modules:
            self._watch(child, grandchild)

    def is_unchanged(self) -> bool:
        """Whether every module is still the one that was read, class and forward included.

        Raises:
            NotFastError: something on a module wants to run or to be seen.
        """
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
                _object(name, cls, state)
        return True


def _object(name: str, cls: Any, state: dict[str, Any]) -> None:
    """Raise unless what stands out about a module is harmless."""
    if state["training"]:
        raise NotFastError(f"training mode ({name} is in it; call model.eval())")
    if state["_forward_pre_hooks"] or _has_user_hook(state["_forward_hooks"]):
        raise NotFastError(f"a hook on {cls.__name__} inside the stack")
    if "forward" in state:
        raise NotFastError(f"the forward of a {cls.__name__} inside the stack was replaced")


def _has_user_hook(hooks: dict) -> bool:
    return any(getattr(hook, "__module__", None) != _HARMLESS_HOOKS for hook in hooks.values())
