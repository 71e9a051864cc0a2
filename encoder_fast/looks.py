"""What every call asks of a model's modules and weights, as cheaply as the host can tell.

By the extension ``encoder_fast._cpu`` where it is built, else in Python, which takes several times
as long. Answers are for comparisons with earlier ones alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from encoder_fast.backends.cpu_kernels import INTERFACE


def _load() -> Any:
    try:
        extension = importlib.import_module("encoder_fast._cpu")
    except ImportError:
        return None
    return extension if getattr(extension, "INTERFACE", None) == INTERFACE else None


_extension = _load()

# PyTorch has it from 2.11 on.
_exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)

# What a module keeps in dictionaries of their own.
_KEPT = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")

Edge = tuple[dict[str, Any], str, nn.Module, type, dict[str, Any], int]
"""The children of a parent, a name among them, the child, its class, its children, their number."""


def can_watch() -> bool:
    """Whether a :class:`Watch` can tell that nothing has changed."""
    return hasattr(_extension, "numbers_of")


def are_quiet(edges: list[Edge]) -> bool:
    """Whether modules are as they were read, and nothing on them wants to run: in eval mode, no
    hook of a forward, no forward of their own. False where nobody can tell cheaply."""
    return _extension is not None and _extension.are_quiet(edges)


class Watch:
    """Tells when a model's modules may have changed: their attributes, parameters, buffers,
    children and hooks, their classes and what is written there, and the hooks of all modules.

    CPython before 3.13 gives a dictionary a new number at every change, so that one pass over these
    numbers replaces reading what the dictionaries hold. Where there are no numbers, everything may
    have changed in every call.
    """

    def __init__(
        self, owner: nn.Module, objects: list[Any], dictionaries: Sequence[dict] = ()
    ) -> None:
        """
        Args:
            owner: the model. It is not kept alive.
            objects: its modules and whatever else with a dictionary belongs to it.
            dictionaries: more of them, that are watched for what is written there.
        """
        self._objects = objects
        self._beside = dictionaries
        # Replaced as a whole, since threads look at the same time.
        self._seen = self._read(owner)

    @property
    def mark(self) -> object:
        """What the last :meth:`look` gave, of whatever thread."""
        return self._seen.mark

    def look(self, owner: nn.Module) -> object:
        """An object that stays the same until something may have changed. What is read of the
        modules afterwards may be taken for granted as long as it does."""
        seen = self._seen
        if not seen.numbers or not _extension.have_numbers(
            seen.objects, seen.dictionaries, owner, seen.numbers
        ):
            self._seen = seen = self._read(owner)
        return seen.mark

    def _read(self, owner: nn.Module) -> _Seen:
        if not can_watch():
            return _Seen(b"", [], [], object())
        objects = [*self._objects, *written_classes(self._objects)]
        before = _extension.numbers_of(objects, [], owner)
        dictionaries = list(self._dictionaries(owner))
        numbers = _extension.numbers_of(objects, dictionaries, owner)
        # If not, another thread has just put a dictionary in another's place.
        are_these = numbers.startswith(before)
        return _Seen(numbers if are_these else b"", objects, dictionaries, object())

    def _dictionaries(self, owner: nn.Module) -> Iterator[dict]:
        yield torch_module._global_forward_hooks
        yield torch_module._global_forward_pre_hooks
        yield owner._modules
        yield from self._beside
        for one in self._objects:
            state = one.__dict__
            yield from (state[name] for name in _KEPT if isinstance(state.get(name), dict))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a :class:`Watch` saw: the numbers of objects' own dictionaries and of further ones,
    empty where there are none."""

    numbers: bytes
    objects: list[Any]
    dictionaries: list[dict]
    mark: object


# Py_TPFLAGS_HEAPTYPE: of a class statement, whose dictionary can change.
_WRITTEN = 1 << 9


def written_classes(objects: list[Any]) -> list[type]:
    """The classes of objects and their bases, as far as they were written in Python."""
    bases = (base for cls in dict.fromkeys(map(type, objects)) for base in cls.__mro__)
    return [base for base in dict.fromkeys(bases) if base.__flags__ & _WRITTEN]


def are_same(objects: list[Any], others: list[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return objects is others or (len(objects) == len(others) and all(map(is_, objects, others)))


def places_of(tensors: Sequence[Tensor | None]) -> object:
    """Which memory each tensor is, and how it reads it; ``None`` stands for no tensor."""
    if _extension is not None and _exchange is not None:
        found = _extension.places_of(tensors, _exchange, nn.Parameter, Tensor)
        if found:
            return found
    return [
        None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype, type(t))
        for t in tensors
    ]


def have_places(tensors: Sequence[Tensor | None], known: object) -> bool:
    """Whether :func:`places_of` would give the ``known`` ones again."""
    if isinstance(known, bytes):
        return _extension.have_places(tensors, _exchange, nn.Parameter, Tensor, known)
    return places_of(tensors) == known


def versions_of(tensors: Sequence[Tensor | None]) -> object | None:
    """How often autograd saw each tensor change; in a list with ``None`` for those where nobody
    counts, if there are any."""
    if _extension is not None:
        found = _extension.versions_of(tensors, torch.Tensor._version)
        if found:
            return found
    return [0 if t is None else None if t.is_inference() else t._version for t in tensors]


def have_versions(tensors: Sequence[Tensor | None], known: object) -> bool:
    """Whether :func:`versions_of` would give the ``known`` ones again."""
    if isinstance(known, bytes):
        return _extension.have_versions(tensors, torch.Tensor._version, known)
    return versions_of(tensors) == known


def is_in_doubt(versions: object) -> bool:
    """Whether :func:`versions_of` found a tensor that nobody counts the changes of."""
    return isinstance(versions, list) and None in versions
