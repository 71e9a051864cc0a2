"""Watching the modules whose arithmetic the engine takes over.

The engine reads weights and calls none of these modules. So a hook, an adapter, a replaced layer,
a replaced forward or training mode on one of them must be seen before each call. What a module
keeps in plain attributes may decide what it computes: when one of those changes, the family reads
the model anew.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from encoder_fast.errors import NotFastError
from encoder_fast.families import Family
from encoder_fast.families.code import Code
from encoder_fast.families.family import has_own_forward
from encoder_fast.families.origin import is_library_code
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

# transformers leaves the first on layers once attentions were asked for; it does nothing on its
# own. The second, of NEFTune, stays while a training evaluates, and does nothing in eval mode.
_HARMLESS_HOOKS = ("output_capturing_hook", "neftune_post_forward_hook")

# Left on embeddings by gradient checkpointing and enable_input_require_grads(). They make what the
# embeddings return require gradients, which does nothing where none are recorded.
_GRADIENT_HOOKS = ("make_inputs_require_grad", "make_inputs_require_grads")

_LIBRARIES_OF_HOOKS = ("transformers.", "peft.", "trl.")


class Stack:
    """The subtree under some children of a model, and the facts of its family, as they were when it
    was read.

    Attributes:
        watch: tells when something about them may have changed.
        code: what their forwards call by name.
        configs: those that modules have of their own.
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
        # A layer's own config is the model's, unless somebody gave either another one.
        configs = {id(c): c for m in modules if (c := m.__dict__.get("config")) is not None}
        configs.pop(id(model.config), None)
        self.configs = list(configs.values())
        self.code = Code(model, modules)
        self.watch = Watch(model, [*modules, *beside, *self.configs], self.code.dictionaries)
        self._modules = modules
        self._attributes = [_attributes_of(module) for module in modules]
        # What is written into one of these shows in no attribute.
        held = {id(v): v for own in self._attributes for v in own.values()}
        self._held = [(v, copy(v)) for v in held.values() if type(v) in (list, dict, set)]
        self._facts = family.facts(model)
        # A buffer that a module gets later is none that was read.
        self._with_buffers = [module for module in modules if module._buffers]
        self._buffers = self._its_buffers()
        self._places, self._versions = places_of(self._buffers), versions_of(self._buffers)
        self._approved: object = None
        self._has_gradient_hook = False

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
                and all(map(_has_attributes, self._modules, self._attributes))
                and are_same(self._its_buffers(), self._buffers)
            ):
                return False
            self._approved = mark
        if self._has_gradient_hook and torch.is_grad_enabled():
            raise NotFastError(
                "gradients are enabled, and a hook makes the embeddings require them (use "
                "torch.inference_mode() or torch.no_grad())"
            )
        return (
            all(value == known for value, known in self._held)
            and have_places(self._buffers, self._places)
            and have_versions(self._buffers, self._versions)
        )

    def _holds_same_modules(self) -> bool:
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            raise NotFastError("global module hooks are registered")
        for cls, forward in self._forwards.items():
            if cls.forward is not forward:
                return False
        if are_quiet(self._edges):
            self._has_gradient_hook = False
            return True
        has_gradient_hook = False
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
                has_gradient_hook |= _look_at(name, child)
        # Set at the end, for threads that look meanwhile.
        self._has_gradient_hook = has_gradient_hook
        return True


# What every module has, looked at in other ways.
_COMMON = frozenset(nn.Module().__dict__) | {"forward"}


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    """The plain attributes that a module was built with: any of them may decide what its forward
    computes."""
    return {name: value for name, value in module.__dict__.items() if name not in _COMMON}


def _has_attributes(module: nn.Module, known: dict[str, Any]) -> bool:
    """Whether attributes are still the ``known`` ones. Further ones are nobody's."""
    state = module.__dict__
    return all(
        name in state and (state[name] is value or _are_equal(state[name], value))
        for name, value in known.items()
    )


def _are_equal(value: Any, known: Any) -> bool:
    return type(value) is type(known) and type(value) in _PLAIN and value == known


_PLAIN = (bool, int, float, str, tuple, list, dict, set)


def _beside(model: Any) -> list[Any]:
    """What the facts of a family are read from beside the stack."""
    return [model.config, getattr(model, "pooler", None)]


def _look_at(name: str, child: nn.Module) -> bool:
    """Raise unless what stands out about a module is harmless; whether it is so without gradients
    alone."""
    state, cls = child.__dict__, type(child)
    if state["training"]:
        raise NotFastError(f"training mode ({name} is in it; call model.eval())")
    names = {_name_of_library_hook(hook) for hook in state["_forward_hooks"].values()}
    if state["_forward_pre_hooks"] or not names <= {*_HARMLESS_HOOKS, *_GRADIENT_HOOKS}:
        raise NotFastError(f"a hook on {cls.__name__} inside the stack")
    if has_own_forward(child):
        raise NotFastError(f"the forward of a {cls.__name__} inside the stack was replaced")
    return not names <= set(_HARMLESS_HOOKS)


def _name_of_library_hook(hook: Any) -> str | None:
    return hook.__name__ if is_library_code(hook, _LIBRARIES_OF_HOOKS) else None
