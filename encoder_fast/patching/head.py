"""A head that reads the first token of each text alone, above a patched encoder.

Classifiers and rerankers look at column 0 and at nothing else. While such a head runs, its encoder
may leave out what the last layer would compute for the other tokens: they are keys and values
there, but no output. The encoder itself can't tell, so the head is patched too and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from encoder_fast.families import Family
from encoder_fast.families.family import has_own_forward, is_library_code

_wanted_of: ContextVar[nn.Module | None] = ContextVar("first_token_of", default=None)


def wants_first_token_alone(encoder: nn.Module) -> bool:
    """Whether this call of ``encoder`` comes from a head that reads no other token."""
    return _wanted_of.get() is encoder


@contextmanager
def first_token_of(encoder: nn.Module | None) -> Iterator[None]:
    """Calls of ``encoder`` in this block, in this thread, are read at the first token alone."""
    token = _wanted_of.set(encoder)
    try:
        yield
    finally:
        _wanted_of.reset(token)


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
        if encoder is not None and not self._is_untouched(model, encoder):
            encoder = None
        with first_token_of(encoder):
            return forward(model, *args, **kwargs)

    def _is_untouched(self, model: nn.Module, encoder: nn.Module) -> bool:
        """Whether nobody but the library's own code sees what the encoder returns."""
        if not self.family.reads_first_token_alone(self.original, model):
            return False
        if is_watched(encoder):
            return False
        readers = [m for name, m in model.named_children() if name != self._encoder_name]
        readers += [m for name, m in encoder.named_children() if name == "pooler"]
        return not any(is_watched(module) for reader in readers for module in reader.modules())


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
