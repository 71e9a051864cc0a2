"""A model that is loaded already: the encoder in it, and code around that which would not run.

``TextEncoder`` takes the encoder, the settings and the tokenizer of such a model, and calls nothing
else of it. What a user has put around the encoder would be left out, so it is refused by name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from encoder_fast.errors import ModelFilesError
from encoder_fast.families.origin import is_users_code

_ADVICE = "give the Hugging Face model inside, or call the model by itself after patch()"


def encoder_in(model: Any, kind: str | None) -> nn.Module:
    """The Hugging Face model in a live one of a ``kind`` as ``model_kind`` says.

    Raises:
        ValueError: there is none, or other code around it.
    """
    from transformers import PreTrainedModel

    def holds_one(module: nn.Module) -> bool:
        return any(isinstance(one, PreTrainedModel) for one in module.modules())

    if not holds_one(model):
        raise ValueError(f"a {type(model).__name__} holds no Hugging Face model")
    if kind is not None:
        _expect_library_code(model)
        # Before version 6 a CrossEncoder has no modules: its only child is the model.
        if hasattr(model, "_first_module"):
            model = next(iter(model.children()))
        model = next(child for child in model.children() if holds_one(child))
    while not isinstance(model, PreTrainedModel):
        inner = _unwrapped(model)
        if inner is None:
            raise ModelFilesError(
                f"TextEncoder would leave out what a {type(model).__name__} does around its "
                f"encoder: {_ADVICE}"
            )
        model = inner
    return model


def _unwrapped(model: Any) -> Any:
    """What is in a library's wrapper that adds nothing of its own to a forward."""
    if any(cls.__module__ == "peft.peft_model" for cls in type(model).__mro__):
        # virtual tokens are put before a text by the wrapper, other adapters are in the layers
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            return None
        return model.get_base_model()
    return getattr(model, "_orig_mod", None)  # of torch.compile


def _expect_library_code(model: nn.Module) -> None:
    """Raise where a user's code is part of a model of sentence-transformers or of its modules."""
    for module in (model, *model.children()):
        name = type(module).__name__
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelFilesError(f"TextEncoder would not run a hook on this {name}: {_ADVICE}")
        method = _users_method(module)
        if method is not None:
            raise ModelFilesError(
                f"TextEncoder would not run {method} of this {name}, which is not "
                f"sentence-transformers' own: {_ADVICE}"
            )


def _users_method(module: nn.Module) -> str | None:
    """A method of the library's that is a user's here: on the instance, in its class, or in a
    subclass. What a subclass adds under a new name is called by nobody but the user."""
    cls = type(module)
    library = [base for base in cls.__mro__ if base.__module__.startswith("sentence_transformers.")]
    found = [item for base in cls.__mro__ for item in vars(base).items()]
    for name, value in [*module.__dict__.items(), *found]:
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if name.startswith("__") or not any(hasattr(base, name) for base in library):
            continue
        if is_users_code(function):
            return name
    return None
