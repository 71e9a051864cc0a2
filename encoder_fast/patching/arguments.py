"""Reading the arguments of a Hugging Face encoder's forward, on transformers 4.56 to 5.x."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from encoder_fast.errors import NotFastError


@dataclass(slots=True)
class Arguments:
    """One call's arguments, as far as the fast path knows them."""

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    output_hidden_states: bool
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


_TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
_FLAGS = ("output_attentions", "output_hidden_states", "return_dict", "use_cache")

# Heads of ModernBERT in transformers 4 repeat what the inputs' shape says.
_SIZES = ("batch_size", "seq_len")


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
        if value is not None and name not in (*_TENSORS, *_FLAGS, *_SIZES):
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
    flag = given.get("output_attentions")
    if getattr(config, "output_attentions", False) if flag is None else flag:
        raise NotFastError("output_attentions")
    hidden_states = given.get("output_hidden_states")
    if hidden_states is None:
        hidden_states = getattr(config, "output_hidden_states", False)
    # transformers 5 also takes the indices of the hidden states that are wanted
    if not isinstance(hidden_states, bool) and hidden_states is not None:
        raise NotFastError("output_hidden_states by index")
    return_dict = given.get("return_dict")
    if return_dict is None:
        return_dict = getattr(config, "return_dict", True)
        # transformers 4, whose forward takes return_dict itself, drops the dict for TorchScript
        if "return_dict" in names and getattr(config, "torchscript", False):
            return_dict = False
    return Arguments(
        input_ids=given.get("input_ids"),
        inputs_embeds=given.get("inputs_embeds"),
        attention_mask=given.get("attention_mask"),
        token_type_ids=given.get("token_type_ids"),
        position_ids=given.get("position_ids"),
        output_hidden_states=bool(hidden_states),
        return_dict=bool(return_dict),
    )
