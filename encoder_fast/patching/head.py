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
from torch import nn

from encoder_fast.families import Family
from encoder_fast.families.family import has_own_forward, is_library_code


@dataclass(frozen=True, slots=True)
class Told:
    """What a head says of the call of its encoder that it is about to make.

    Attributes:
        alone: it reads the first token of each text, and nobody else sees what is returned.
        first_column: it reads the first token, and somebody else may see it.
        padding: what reads padding, if anything does.
    """

    encoder: nn.Module
    alone: bool = False
    first_column: bool = False
    padding: str | None = None


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
        forward = self.original.forward
        if torch.compiler.is_compiling():
            return forward(model, *args, **kwargs)
        encoder = model._modules.get(self._encoder_name)
        with _telling(None if encoder is None else self._tell(model, encoder, args, kwargs)):
            return forward(model, *args, **kwargs)

    def _tell(
        self, model: nn.Module, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> Told:
        if self.family.is_token_level(self.original):
            return Told(encoder, padding=self._loss_over_padding(model, args, kwargs))
        alone = self._is_untouched(model, encoder)
        reads_first = self.family.reads_first_column(self.original, model)
        return Told(encoder, alone, first_column=reads_first and not alone)

    def _loss_over_padding(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> str | None:
        """The loss that a call asks for, if padded positions count in it."""
        name = self.original.__name__
        given = _by_name(self.original.forward, model, args, kwargs) if args else kwargs
        if given.get("start_positions") is not None and given.get("end_positions") is not None:
            return f"the loss of {name}, which is over all positions"
        labels, mask = given.get("labels"), given.get("attention_mask")
        if labels is None or mask is None or labels.shape != mask.shape:
            return None
        # Who asks for a loss looks at it, so one more look at the device does no harm.
        if self.family.masks_its_loss(self.original) or not ((labels != -100) & (mask == 0)).any():
            return None
        return f"the loss of {name}, with labels other than -100 there"

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
    """Whether code of the user's own may see what the module is given or returns: a hook, or a
    forward on the instance or in its class."""
    cls: Any = type(module)
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or has_own_forward(module)
        or not is_library_code(cls.forward, _CODE)
    )
