"""A head above a patched encoder that says what it reads: the encoder itself can't tell.

Classifiers and rerankers look at column 0 and at nothing else. While such a head runs, its encoder
may leave out what the last layer would compute for the other tokens: they are keys and values
there, but no output. A head that goes token by token may be asked for a loss, and padded positions
may count in that.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from encoder_fast.families import Family
from encoder_fast.families.family import has_own_call, has_own_forward
from encoder_fast.families.origin import is_library_code


@dataclass(frozen=True, slots=True)
class Told:
    """What a head says of the call of its encoder that it is about to make.

    Attributes:
        alone: it reads the first token of each text, and nobody else sees what is returned.
        first_column: it reads the first token, and somebody else may see it.
        name: its class.
        spans: it computes a loss over all positions.
        labels: those of its loss over the positions that have one, ``(B, S)``.
    """

    encoder: nn.Module
    name: str
    alone: bool = False
    first_column: bool = False
    spans: bool = False
    labels: Tensor | None = None


_LABELS = ("labels", "start_positions")

_told: ContextVar[Told | None] = ContextVar("told_of_encoder", default=None)


def told_of(encoder: nn.Module) -> Told | None:
    """What the head says that this call of ``encoder`` comes from, if one does."""
    told = _told.get()
    return told if told is not None and told.encoder is encoder else None


@contextmanager
def _telling(told: Told | None) -> Iterator[None]:
    """What is said of calls in this block, in this thread."""
    token = _told.set(told)
    try:
        yield
    finally:
        _told.reset(token)


class HeadState:
    """What a patched head carries: where its encoder is. It decides anew in every call."""

    entry = "forward"

    def __init__(self, family: Family, original: Any, encoder_name: str) -> None:
        self.family = family
        self.original = original
        self._encoder_name = encoder_name

    def __copy__(self) -> HeadState:
        return HeadState(self.family, self.original, self._encoder_name)

    def attempt(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The head's own forward, as ever."""
        # What a traced forward says is not heard. Without a loss the encoder can do without.
        is_traced = torch.compiler.is_compiling()
        if is_traced and all(kwargs.get(name) is None for name in _LABELS):
            return self.original.forward(model, *args, **kwargs)
        return self._run(model, args, kwargs)

    @torch.compiler.disable
    def _run(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        encoder = model._modules.get(self._encoder_name)
        with _telling(None if encoder is None else self._tell(model, encoder, args, kwargs)):
            return self.original.forward(model, *args, **kwargs)

    def _tell(
        self, model: nn.Module, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> Told:
        name = self.original.__name__
        if not self.family.is_token_level(self.original):
            alone = self._is_untouched(model, encoder)
            reads_first = self.family.reads_first_column(self.original, model)
            return Told(encoder, name, alone, first_column=reads_first and not alone)
        given = _by_name(self.original.forward, model, args, kwargs) if args else kwargs
        spans = given.get("start_positions") is not None and given.get("end_positions") is not None
        labels = given.get("labels")
        if not isinstance(labels, Tensor) or self.family.masks_its_loss(self.original):
            labels = None
        return Told(encoder, name, spans=spans, labels=labels)

    def _is_untouched(self, model: nn.Module, encoder: nn.Module) -> bool:
        """Whether nobody but the library's own code sees what the encoder returns."""
        if not self.family.reads_first_token_alone(self.original, model):
            return False
        if is_watched(encoder):
            return False
        readers = [m for name, m in model.named_children() if name != self._encoder_name]
        readers += [m for name, m in encoder.named_children() if name == "pooler"]
        return not any(is_watched(module) for reader in readers for module in reader.modules())


def _by_name(forward: Any, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        return inspect.signature(forward).bind_partial(model, *args, **kwargs).arguments
    except TypeError:  # which the call itself will raise
        return kwargs


_CODE = ("transformers.", "torch.nn.", "sentence_transformers.", "encoder_fast.")


def is_watched(module: nn.Module) -> bool:
    """Whether code of the user's own may see what the module is given or returns: a hook, a
    forward on the instance or in its class, or what a call runs around it."""
    cls: Any = type(module)
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or has_own_forward(module)
        or not is_library_code(cls.forward, _CODE)
        or has_own_call(module)
    )
