"""What was found about the modules around an encoder, for as long as none of them changes.

To read them takes longer than a small batch on a GPU. One look at their dictionaries, as at those
of the encoder itself, tells whether they are what they were.
"""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

from torch import nn

from encoder_fast.looks import Watch, written_classes

T = TypeVar("T")


class Memory(Generic[T]):
    """Answers about an encoder, by what a call says of itself.

    Modules above the encoder are not kept alive, but their dictionaries are: drop this when one of
    them is gone.
    """

    def __init__(
        self, encoder: nn.Module, above: list[nn.Module], beside: list[nn.Module], others: list[Any]
    ) -> None:
        """
        Args:
            above: modules that hold the encoder.
            beside: modules that read what it returns.
            others: further objects that the answers depend on.
        """
        self.answers: dict[Any, T] = {}
        self._above = [(weakref.ref(one), type(one), one.__dict__) for one in above]
        dictionaries = [one.__dict__ for one in above]
        for one in (encoder, *above):
            dictionaries += [one._modules, one._forward_hooks, one._forward_pre_hooks]
        objects = [*beside, *others, *written_classes([encoder, *above])]
        self._watch = Watch(encoder, objects, dictionaries)
        self._mark = self._watch.mark

    def holds(self, encoder: nn.Module) -> bool:
        """Whether the answers still do."""
        if self._watch.look(encoder) is not self._mark:
            return False
        for ref, cls, attributes in self._above:
            one = ref()
            if type(one) is not cls or one.__dict__ is not attributes:
                return False
        return True
