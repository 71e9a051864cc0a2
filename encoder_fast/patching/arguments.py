"""Reading the arguments of a Hugging Face encoder's forward, on transformers 4.56 to 5.x."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from torch import Tensor, nn

from encoder_fast.errors import NotFastError


@dataclass(slots=True)
class Arguments:
    """One call's arguments, as far as the fast path knows them.

    Attributes:
        hidden_states: which hidden states are wanted, by index; negative ones count from the end.
            ``None`` where all of them are, if ``output_hidden_states`` is set.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    output_hidden_states: bool
    hidden_states: tuple[int, ...] | None
    return_dict: bool

    @property
    def source(self) -> Tensor:
        """The one of ``input_ids`` and ``inputs_embeds`` that was given."""
        source = self.inputs_embeds if self.input_ids is None else self.input_ids
        if source is None:
            raise NotFastError("not exactly one of input_ids and inputs_embeds")
        return source


@lru_cache(maxsize=256)
def parameter_names(cls: Any) -> tuple[str, ...]:
    """The names of the forward's parameters after ``self``, ``**kwargs`` left out."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


@lru_cache(maxsize=256)
def _takes(cls: Any, name: str) -> bool:
    """Whether the forward takes an argument that is not among :func:`parameter_names`."""
    parameters = inspect.signature(cls.forward).parameters.values()
    if any(
        p.kind is p.VAR_KEYWORD or (p.kind is p.KEYWORD_ONLY and p.name == name) for p in parameters
    ):
        return True
    # The library's decorators take these out of the call.
    return name in _FLAGS[:3] and hasattr(cls.forward, "__wrapped__")


_TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
_FLAGS = ("output_attentions", "output_hidden_states", "return_dict", "use_cache")

# Heads of ModernBERT in transformers 4 repeat what the inputs' shape says.
_SIZES = ("batch_size", "seq_len")

_KNOWN = frozenset((*_TENSORS, *_FLAGS, *_SIZES))

# A forward with **kwargs takes these, and neither an encoder nor its attention reads them. Heads of
# transformers 5 hand on to their encoder whatever they are given.
_UNREAD = frozenset(
    (
        # for losses: the Trainer's, and labels under the names that datasets and heads have
        "num_items_in_batch",
        "ignore_index",
        "shift_labels",
        "label",
        "label_ids",
        "labels",
        "next_sentence_label",
        "sentence_order_label",
        "start_positions",
        "end_positions",
        # what a tokenizer returns if it is asked to
        "length",
        "num_truncated_tokens",
        "offset_mapping",
        "overflow_to_sample_mapping",
        "overflowing_tokens",
        "special_tokens_mask",
        # for other kinds of models
        "logits_to_keep",
        "output_router_logits",
    )
)


def read_arguments(cls: Any, config: Any, args: tuple, kwargs: dict[str, Any]) -> Arguments:
    """The call's arguments.

    Raises:
        NotFastError: the fast path can't take them.
    """
    names = parameter_names(cls)
    if len(args) > len(names):
        raise NotFastError("more positional arguments than the model takes")
    given = dict(zip(names, args, strict=False))
    if given.keys() & kwargs.keys():
        raise NotFastError("an argument given twice")
    given.update(kwargs)
    for name, value in given.items():
        if name not in names and not _takes(cls, name):
            raise NotFastError(f"an argument that the model does not take, {name}")
        if value is None or name in _KNOWN:
            continue
        if name not in _UNREAD or name in names:
            raise NotFastError(f"argument {name}")
    for name in _TENSORS:
        value = given.get(name)
        # Subclasses too: fake, distributed or wrapped tensors know their own arithmetic.
        if value is not None and type(value) not in (Tensor, nn.Parameter):
            raise NotFastError(f"{name} is a {type(value).__name__}, not a plain tensor")
    if (given.get("input_ids") is None) == (given.get("inputs_embeds") is None):
        raise NotFastError("not exactly one of input_ids and inputs_embeds")
    source = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
    for axis, name in enumerate(_SIZES):
        size = given.get(name)
        if size is not None and (source.dim() <= axis or size != source.shape[axis]):
            raise NotFastError(f"{name} other than the input's")
    if _flag("output_attentions", given, names, config, False):
        raise NotFastError("output_attentions")
    hidden_states = _flag("output_hidden_states", given, names, config, False)
    return_dict = _flag("return_dict", given, names, config, True)
    # transformers 4, whose forward takes return_dict itself, drops the dict for TorchScript
    if given.get("return_dict") is None and "return_dict" in names:
        return_dict = return_dict and not setting(config, "torchscript", False)
    return Arguments(
        input_ids=given.get("input_ids"),
        inputs_embeds=given.get("inputs_embeds"),
        attention_mask=given.get("attention_mask"),
        token_type_ids=given.get("token_type_ids"),
        position_ids=given.get("position_ids"),
        output_hidden_states=bool(hidden_states),
        hidden_states=(_indices(hidden_states) if "output_hidden_states" not in names else None),
        return_dict=return_dict is None or bool(return_dict),
    )


def _flag(
    name: str, given: Mapping[str, Any], names: tuple[str, ...], config: Any, default: bool
) -> Any:
    """What a call asks for under ``name``.

    Where the forward takes it by name, ``None`` leaves it to the config. The decorators that take
    it out of the forward's ``**kwargs`` ask the config only where it is left out.
    """
    value = given.get(name)
    if value is None and (name in names or name not in given):
        return setting(config, name, default)
    return value


def setting(config: Any, name: str, default: Any) -> Any:
    """An attribute of a config. Where it stands in the config's dictionary it is read there: the
    look-up that transformers' configs have of their own takes ten times as long."""
    attributes = object.__getattribute__(config, "__dict__")
    return attributes[name] if name in attributes else getattr(config, name, default)


@cache
def _selects_hidden_states() -> bool:
    """Whether this transformers takes indices for ``output_hidden_states``."""
    name = "transformers.utils.output_capturing"
    if importlib.util.find_spec(name) is None:
        return False
    return hasattr(importlib.import_module(name), "selected_hidden_states")


def _indices(hidden_states: Any) -> tuple[int, ...] | None:
    if isinstance(hidden_states, bool) or hidden_states is None or not _selects_hidden_states():
        return None
    return (hidden_states,) if isinstance(hidden_states, int) else tuple(hidden_states)
