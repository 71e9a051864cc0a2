"""What a family is, and the checks that every family makes while it reads a model."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder_fast.backends.memory import lacks_memory
from encoder_fast.errors import UnsupportedModelError
from encoder_fast.families.origin import MODELS, is_library_code, is_users_code
from encoder_fast.ops.linear import Activation
from encoder_fast.spec import EncoderSpec


def _call_pooler(model: Any, hidden: Tensor) -> Tensor:
    return model.pooler(hidden)


def facts(model: Any) -> tuple:
    """What a spec was read from beside the modules of the stack and their buffers."""
    config, pooler = model.config, getattr(model, "pooler", None)
    return (
        getattr(config, "num_hidden_layers", None),
        getattr(config, "position_embedding_type", None),
        getattr(config, "tie_last_hidden_states", None),
        getattr(model, "z_steps", None),
        type(pooler),
        getattr(type(pooler), "forward", None),
        getattr(pooler, "__dict__", {}).get("forward"),
    )


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        name: the short name that ``report()`` shows.
        module: the transformers module that defines the classes.
        class_names: the classes of bare encoders, by name: looking for a model never imports one.
        output_class: the name of the output class in ``transformers.modeling_outputs``.
        stack: the children of the model that the engine takes over, where it has them.
        read: from a model of this family to its spec; raises :class:`UnsupportedModelError` with
            the reason where this particular model can't run fast.
        pool: from a model that has a pooler, and its last hidden state ``(B, S, N)``, to the pooled
            output. It calls the model's own modules, so that their hooks run.
        facts: what a spec was read from beside the modules of the stack and their buffers. All
            of it must come from attributes of the model, its configuration, its pooler and the
            stack's modules: it is asked again only where one of these was written to.
        first_token_heads: the classes of models whose head reads column 0 of the hidden states
            and nothing else of them; each with the class of the child that does it, or ``None``
            where the model's own forward or the encoder's pooler does.
    """

    name: str
    module: str
    class_names: tuple[str, ...]
    output_class: str
    stack: tuple[str, ...]
    read: Callable[[nn.Module], EncoderSpec]
    pool: Callable[[Any, Tensor], Tensor] = _call_pooler
    facts: Callable[[Any], tuple] = facts
    first_token_heads: Mapping[str, str | None] = field(default_factory=dict)

    def matches(self, cls: Any) -> bool:
        """Whether ``cls`` is one of this family's classes, or a subclass that keeps its methods."""
        for depth, base in enumerate(cls.__mro__):
            if base.__module__ == self.module and base.__name__ in self.class_names:
                methods = set(vars(base)) | _MASK_METHODS
                return is_library_code(cls.forward) and not any(
                    name in methods and inspect.isfunction(value) and name != "__init__"
                    for subclass in cls.__mro__[:depth]
                    for name, value in vars(subclass).items()
                )
        return False

    def has_head(self, cls: Any) -> bool:
        """Whether ``cls`` is a model of this family, with its forward."""
        return bool(self._names_of_head(cls))

    def reads_first_column(self, cls: Any, model: nn.Module) -> bool:
        """Whether ``model``, of class ``cls``, has one of ``first_token_heads``, as it came or not.

        ModernBERT's can be told to take the mean.
        """
        pools = getattr(getattr(model, "config", None), "classifier_pooling", "cls")
        return pools == "cls" and any(
            name in self.first_token_heads for name in self._names_of_head(cls)
        )

    def is_token_level(self, cls: Any) -> bool:
        """Whether ``cls`` is a model whose head never reads column 0 alone."""
        names = self._names_of_head(cls)
        return bool(names) and not any(name in self.first_token_heads for name in names)

    def answers_questions(self, cls: Any) -> bool:
        """Whether ``cls`` is a model that finds answers: its loss is over all positions."""
        return any(name.endswith("ForQuestionAnswering") for name in self._names_of_head(cls))

    def masks_its_loss(self, cls: Any) -> bool:
        """Whether the loss of ``cls`` goes by the mask, and not by the labels alone."""
        return "ElectraForPreTraining" in self._names_of_head(cls)

    def check_head(self, parent: nn.Module) -> None:
        """Refuse a head of this family that reads padding as text.

        Raises:
            UnsupportedModelError: ELECTRA's summary can take the last column, or the mean of all.
        """
        for child in parent.children():
            kind = getattr(child, "summary_type", "first")
            if type(child).__module__ == self.module and kind != "first":
                raise UnsupportedModelError(f"summary_type={kind!r} reads padded columns as text")

    def reads_first_token_alone(self, cls: Any, model: nn.Module) -> bool:
        """Whether ``model``, of class ``cls``, has one of ``first_token_heads`` as it came."""
        if not self.reads_first_column(cls, model):
            return False
        for name in self._names_of_head(cls):
            if name in self.first_token_heads:
                reader = self.first_token_heads[name]
                return reader is None or any(
                    type(child).__name__ == reader and type(child).__module__ == self.module
                    for child in model.children()
                )
        return False

    def _names_of_head(self, cls: Any) -> tuple[str, ...]:
        """The family's own classes that ``cls`` is, if its forward is still theirs."""
        return _names_in(self.module, cls, cls.forward)


@functools.lru_cache(maxsize=256)
def _names_in(module: str, cls: Any, forward: Any) -> tuple[str, ...]:
    if not is_library_code(forward):
        return ()
    return tuple(base.__name__ for base in cls.__mro__ if base.__module__ == module)


# What a BERT-like forward calls on itself, beside the methods that its own class defines.
_MASK_METHODS = {
    "__call__",
    "_call_impl",
    "create_extended_attention_mask_for_decoder",
    "get_extended_attention_mask",
    "get_head_mask",
    "invert_attention_mask",
}


def last_state_is_normed(model: Any) -> bool:
    """Whether a model of transformers 5 gives, as the last of its hidden states, the last hidden
    state itself; else it gives what the last layer did, ahead of any norm after it."""
    return getattr(model.config, "tie_last_hidden_states", None) is not False


def expect(module: nn.Module, *names: str) -> nn.Module:
    """``module`` if its class is one of ``names``; the engine knows no other arithmetic.

    A subclass would do, say, low-rank adaptation or quantisation, and reading its ``weight`` would
    silently give other numbers.
    """
    cls: Any = type(module)
    if not cls.__module__.startswith(MODELS) or cls.__name__ not in names:
        raise UnsupportedModelError(
            f"a {cls.__module__}.{cls.__name__} stands where {' or '.join(names)} is expected"
        )
    if not is_library_code(cls.forward) or has_own_forward(module):
        raise UnsupportedModelError(f"the forward of {cls.__name__} was replaced")
    return module


patched_methods: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""The forwards of patched classes, each with the class whose forward it stands for."""


def _originals(forward: Any) -> Any:
    cls = patched_methods.get(forward) if isinstance(forward, FunctionType) else None
    return forward if cls is None else cls.forward


def has_own_forward(module: nn.Module) -> bool:
    """Whether a forward on the instance does something else than the one of its class.

    accelerate leaves the module's own method there when it removes a hook, bound again. That may
    be the method from before ``patch``, or the one from between ``patch`` and ``unpatch``.
    """
    if "forward" not in module.__dict__:
        return False
    own = module.__dict__["forward"]
    while type(own) is functools.partial and not own.args and not own.keywords:
        own = own.func
    if not inspect.ismethod(own) or own.__self__ is not module:
        return True
    # accelerate's unwrap_model takes off every decorator, those of the class's own forward too.
    cls: Any = type(module)
    function, bound = _originals(cls.forward), _originals(own.__func__)
    while function is not bound:
        if not hasattr(function, "__wrapped__"):
            return True
        function = function.__wrapped__
    return False


_PYTORCHS = [f for f in (nn.Module.__call__, nn.Module._call_impl) if is_library_code(f)]


def has_own_call(module: nn.Module) -> bool:
    """Whether a user's code stands between a call of the module and its forward."""
    cls: Any = type(module)
    return (
        "_call_impl" in module.__dict__
        or is_users_code(module.__dict__.get("_compiled_call_impl"))
        or any(
            call not in _PYTORCHS and not is_library_code(call)
            for call in (cls.__call__, cls._call_impl)
        )
    )


def check_buffers(model: nn.Module, stack: tuple[str, ...]) -> None:
    """Raise where the storage of a buffer of the stack was freed: to read it would kill the
    process."""
    for name in stack:
        child = model._modules.get(name)
        for buffer_name, buffer in () if child is None else child.named_buffers():
            if not buffer.is_meta and lacks_memory(buffer):
                raise RuntimeError(f"the storage of the buffer {buffer_name} was freed")


def expect_default_ids(embeddings: nn.Module) -> None:
    """Refuse embeddings whose default positions or token types are not the usual ones."""
    positions = embeddings._buffers.get("position_ids")
    types = embeddings._buffers.get("token_type_ids")
    if positions is not None and not positions.is_meta:
        usual = torch.arange(positions.shape[-1], device=positions.device)
        if not torch.equal(positions.reshape(-1), usual.to(positions.dtype)):
            raise UnsupportedModelError("the buffer position_ids does not count from 0")
    if types is not None and not types.is_meta and bool(types.any()):
        raise UnsupportedModelError("the buffer token_type_ids is not all zeros")


def expect_linear(module: nn.Module) -> nn.Linear:
    expect(module, "Linear")
    assert isinstance(module, nn.Linear)
    return module


def expect_layer_norm(module: nn.Module) -> nn.LayerNorm:
    expect(module, "LayerNorm")
    assert isinstance(module, nn.LayerNorm)
    if len(module.normalized_shape) != 1:
        raise UnsupportedModelError(f"a LayerNorm over {tuple(module.normalized_shape)}")
    if module.weight is not None and module.weight.shape != module.normalized_shape:
        raise UnsupportedModelError("a LayerNorm whose normalized_shape is not its weight's")
    return module


def expect_embedding(module: nn.Module) -> nn.Embedding:
    expect(module, "Embedding")
    assert isinstance(module, nn.Embedding)
    if module.max_norm is not None:
        raise UnsupportedModelError("an Embedding with max_norm rewrites its weights as it runs")
    return module


def check_heads(attention: Any, head_size: int, linear: nn.Linear, projections: int = 1) -> None:
    """Refuse attention that cuts what ``linear`` gives, so many projections, into other heads than
    those of ``head_size``."""
    own, width = attention.__dict__, linear.weight.shape[0] // projections
    heads = {own[name] for name in ("num_attention_heads", "n_heads", "num_heads") if name in own}
    widths = {own[name] for name in ("all_head_size", "dim") if name in own}
    if any(count * head_size != width for count in heads) or widths - {width}:
        raise UnsupportedModelError("attention whose heads don't add up to its projections")


def _is_gelu(act: Any) -> bool:
    """Whether what a GELU of transformers calls is the function that it was built with."""
    call = act.act
    if isinstance(call, functools.partial):
        is_tanh = type(act).__name__ != "GELUActivation"
        return is_tanh and call.func is F.gelu and call.keywords == {"approximate": "tanh"}
    if getattr(call, "__self__", None) is act:
        return is_library_code(call.__func__)
    return type(act).__name__ == "GELUActivation" and call is F.gelu


def read_activation(act: Any) -> Activation:
    """The name of an activation that can be fused, or the model's own callable."""
    cls = type(act)
    if cls is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    if cls is nn.ReLU:
        return "relu"
    # By class and home: a user's class of the same name is another function.
    if cls.__module__ != "transformers.activations" or not is_library_code(cls.forward):
        return act
    if "act" in act.__dict__ and not _is_gelu(act):
        return act
    fused = {
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh",
    }
    return fused.get(cls.__name__, act)
