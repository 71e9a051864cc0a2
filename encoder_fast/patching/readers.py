"""Who reads what an encoder returns, and whether zeros in place of padding would show.

Most readers ignore padding: poolings by the mask, heads that go token by token, heads that read the
first token. Some library modules read it as if it were text; under these a call with padding runs
the original forward. The user's own code gets the zeros, and the report says so.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from encoder_fast.families import Family
from encoder_fast.families.origin import is_library_code
from encoder_fast.patching.head import told_of
from encoder_fast.patching.locate import original_class
from encoder_fast.patching.sentence import is_expanding, pooling_modes, pools_first_token

# It is asked of the same functions in every call.
_is_of = functools.lru_cache(maxsize=512)(is_library_code)

CALLER = "whoever called it"

# Of sentence-transformers: they go by the mask or token by token, or don't read tokens' states.
_IGNORE_PADDING = {
    *("Pooling", "SpladePooling", "WeightedLayerPooling", "WordWeights"),
    *("MultiVectorMask", "BaseTokenPooling"),
    *("Dense", "Normalize", "LayerNorm", "Dropout", "SparseAutoEncoder"),
    *("Transformer", "MLMTransformer", "CLIPModel", "StaticEmbedding", "SparseStaticEmbedding"),
    *("BoW", "WordEmbeddings"),
}

_UNKNOWN = "is not known to ignore padding"

# They go over neighbouring columns, or read the last one.
_READ_PADDING = ("CNN", "LSTM", "LogitScore")

# Of transformers: they read an encoder by the mask, or through its pooler.
_MASKING_MODELS = {"EncoderDecoderModel", "VisionTextDualEncoderModel"}

# And these read its first column, or hand it on to whatever does.
_FIRST_COLUMN_MODELS = {
    *("DPREncoder", "ModernVBertModel", "UltraVBertModel"),
    *("PeAudioModel", "PeVideoModel", "PeAudioVideoModel"),
}

# Their forwards hand on what the module in them returns.
_WRAPPERS = ("torch.", "peft.", "accelerate.")


@dataclass(slots=True)
class Readers:
    """Who reads what one call returns, in a report's words.

    Attributes:
        of_padding: what reads padding as if it were text, or may do so.
        of_first_column: what may read the first column, padding or not.
        own: the user's own code that reads it.
        labels: of a loss that reads padding where they are not -100, and whose loss it is.
    """

    of_padding: str | None = None
    of_first_column: str | None = None
    own: str | None = None
    labels: tuple[Tensor, str] | None = None


POOLING = Readers()
"""Of packed tokens: no padding is there."""


class Surroundings:
    """Where an encoder sits in the modules that were patched; they are looked at in each call."""

    def __init__(self, family: Family, places: list[tuple[nn.Module, tuple[str, ...]]]) -> None:
        """
        Args:
            places: modules that hold the encoder, which are not kept alive, and the names of their
                descendants on the way down to it; without names it is the encoder itself.
        """
        self._family = family
        self._places = [(weakref.ref(root), names) for root, names in places if names]

    def places(self) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """As they were given, without modules that are gone."""
        for ref, names in self._places:
            root = ref()
            if root is not None:
                yield root, names

    def copied(self, memo: dict[int, Any]) -> Surroundings:
        """Those of a copy of the encoder, in the modules that are copied with it."""
        copies = [(memo.get(id(root)), names) for root, names in self.places()]
        return Surroundings(self._family, [place for place in copies if place[0] is not None])

    def readers(self, encoder: nn.Module) -> Readers:
        """Who reads what this call of ``encoder`` returns."""
        found = Readers()
        told = told_of(encoder)
        if told is not None and told.spans:
            found.of_padding = f"the loss of {told.name}, which is over all positions"
        if told is not None and told.labels is not None:
            found.labels = told.labels, told.name
        is_held = False
        for root, names in self.places():
            way = _way_down(root, names, encoder)
            if way is not None:
                is_held = True
                self._read_holder(encoder, *way, found)
                for module in _flat(way[1]):
                    _read_behind(module, found)
        if not is_held:
            found.own = CALLER
        return found

    def _read_holder(
        self, encoder: nn.Module, above: list[nn.Module], behind: list[nn.Module], found: Readers
    ) -> None:
        """What the module that calls the encoder does with its output."""
        if any(map(is_expanding, above)):
            found.of_padding = "query expansion, which scores padding"
        for module in reversed(above):
            cls = original_class(module)
            if _is_of(cls.forward, _WRAPPERS):
                continue
            if _is_of(cls.forward, ("sentence_transformers.",)):
                if not behind:
                    found.own = CALLER
            elif self._family.has_head(cls):
                self._read_head(encoder, module, cls, found)
            elif not _is_of(cls.forward):
                found.own = found.of_first_column = cls.__name__
            elif cls.__name__ in _FIRST_COLUMN_MODELS:
                found.of_first_column = cls.__name__
            elif cls.__name__ not in _MASKING_MODELS:
                found.of_padding = f"{cls.__name__}, which {_UNKNOWN}"
            return
        found.own = CALLER

    def _read_head(self, encoder: nn.Module, head: nn.Module, cls: Any, found: Readers) -> None:
        for child in head.children():
            code = original_class(child)
            if child is not encoder and not _is_of(code.forward, ("transformers.", *_WRAPPERS)):
                found.own = found.of_first_column = code.__name__
        told = told_of(encoder)
        if told is None:
            # It may be traced, or called through a forward that goes around what is patched.
            is_reading = self._family.reads_first_column(cls, head)
            if "forward" in head.__dict__ and self._family.answers_questions(cls):
                found.of_padding = f"{cls.__name__}, whose forward was replaced before patch()"
        else:
            is_reading = told.first_column
        if is_reading and getattr(encoder, "pooler", None) is None:
            found.of_first_column = cls.__name__


def _way_down(
    root: nn.Module, names: tuple[str, ...], encoder: nn.Module
) -> tuple[list[nn.Module], list[nn.Module]] | None:
    """The modules above an encoder, and those that run after it in a sequence; nothing where the
    way leads elsewhere by now."""
    above: list[nn.Module] = []
    behind: list[nn.Module | None] = []
    module: nn.Module | None = root
    for name in names:
        if module is None:
            return None
        above.append(module)
        children = module._modules
        if isinstance(module, nn.Sequential) and name in children:
            later = list(children)
            behind += [children[key] for key in later[later.index(name) + 1 :]]
        module = children.get(name)
    return (above, [one for one in behind if one is not None]) if module is encoder else None


def _flat(modules: list[nn.Module]) -> Iterator[nn.Module]:
    """Without sequences and routers, which hand on what they are given."""
    for module in modules:
        if isinstance(module, nn.Sequential | nn.ModuleDict) or _is_router(module):
            yield from _flat(list(module.children()))
        else:
            yield module


def _is_router(module: nn.Module) -> bool:
    cls = original_class(module)
    return cls.__name__ in ("Router", "Asym") and _is_of(cls.forward, ("sentence_transformers.",))


def _read_behind(module: nn.Module, found: Readers) -> None:
    """What a module that runs after the encoder does with its output."""
    cls = original_class(module)
    if not _is_of(cls.forward, ("sentence_transformers.",)):
        found.own = found.of_first_column = cls.__name__
    elif _IGNORE_PADDING.isdisjoint(base.__name__ for base in cls.__mro__):
        what = "reads padding" if cls.__name__ in _READ_PADDING else _UNKNOWN
        found.of_padding = f"{cls.__name__}, which {what}"
    elif cls.__name__ == "Pooling" and "cls" in pooling_modes(module) and not pools_first_token():
        found.of_first_column = cls.__name__


def ways_to(root: nn.Module, wanted: set[int]) -> dict[int, list[tuple[str, ...]]]:
    """All ways down from ``root`` to modules, by their ``id``; a module may be held twice."""
    found: dict[int, list[tuple[str, ...]]] = {one: [] for one in wanted}

    def go(module: nn.Module, names: tuple[str, ...], above: set[int]) -> None:
        if id(module) in wanted:
            found[id(module)].append(names)
        elif id(module) not in above:
            for name, child in module._modules.items():
                if child is not None:
                    go(child, (*names, name), above | {id(module)})

    go(root, (), set())
    return found
