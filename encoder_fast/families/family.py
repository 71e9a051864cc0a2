"""What a family is, and the checks that every family makes while it reads a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from encoder_fast.errors import UnsupportedModelError
from encoder_fast.ops.linear import Activation
from encoder_fast.spec import EncoderSpec


def _call_pooler(model: Any, hidden: Tensor) -> Tensor:
    return model.pooler(hidden)


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        name: the short name that ``report()`` shows.
        module: the transformers module that defines the classes.
        class_names: the classes of bare encoders, by name: looking for a model never imports one.
        output_class: the name of the output class in ``transformers.modeling_outputs``.
        stack: the children of the model that the engine takes over, where it has them.
        pool: from a model that has a pooler, and its last hidden state ``(B, S, N)``, to the pooled
            output. It calls the model's own modules, so that their hooks run.
        first_token_heads: the classes of models with a head that reads column 0 of the hidden
            states itself, past any pooler.
        read: from a model of this family to its spec; raises :class:`UnsupportedModelError` with
            the reason where this particular model can't run fast.
    """

    name: str
    module: str
    class_names: tuple[str, ...]
    output_class: str
    stack: tuple[str, ...]
    read: Callable[[nn.Module], EncoderSpec]
    pool: Callable[[Any, Tensor], Tensor] = _call_pooler
    first_token_heads: tuple[str, ...] = ()

    def matches(self, cls: Any) -> bool:
        """Whether ``cls`` is one of this family's classes, or a subclass that keeps its forward."""
        for base in cls.__mro__:
            if base.__module__ == self.module and base.__name__ in self.class_names:
                return cls.forward is base.forward
        return False


def expect(module: nn.Module, *names: str) -> nn.Module:
    """``module`` if its class is exactly one of ``names``; the engine knows no other arithmetic.

    A subclass would do, say, low-rank adaptation or quantisation, and reading its ``weight`` would
    silently give other numbers.
    """
    cls = type(module)
    homes = ("transformers.models.", "torch.nn.modules.")
    if not cls.__module__.startswith(homes) or cls.__name__ not in names:
        raise UnsupportedModelError(
            f"a {cls.__module__}.{cls.__name__} stands where {' or '.join(names)} is expected"
        )
    if not cls.forward.__module__.startswith(homes) or "forward" in module.__dict__:
        raise UnsupportedModelError(f"the forward of {cls.__name__} was replaced")
    return module


def expect_linear(module: nn.Module) -> nn.Linear:
    expect(module, "Linear")
    assert isinstance(module, nn.Linear)
    return module


def expect_layer_norm(module: nn.Module) -> nn.LayerNorm:
    expect(module, "LayerNorm")
    assert isinstance(module, nn.LayerNorm)
    if len(module.normalized_shape) != 1:
        raise UnsupportedModelError(f"a LayerNorm over {tuple(module.normalized_shape)}")
    return module


def expect_embedding(module: nn.Module) -> nn.Embedding:
    expect(module, "Embedding")
    assert isinstance(module, nn.Embedding)
    if module.max_norm is not None:
        raise UnsupportedModelError("an Embedding with max_norm rewrites its weights as it runs")
    return module


def read_activation(act: Callable) -> Activation:
    """The name of an activation that can be fused, or the model's own callable."""
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    name = type(act).__name__ if isinstance(act, nn.Module) else ""
    fused = {
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh",
        "ReLU": "relu",
    }
    return fused.get(name, act)
