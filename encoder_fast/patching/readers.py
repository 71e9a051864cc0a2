"""Who reads what an encoder returns, and whether zeros in place of padding would show.

Most readers ignore padding: poolings by the mask, heads that go token by token, heads that read the
first token. Some library modules read it as if it were text; under these a call with padding runs
the original forward. The user's own code gets the zeros, and the report says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from encoder_fast.families import Family
from encoder_fast.families.origin import is_library_code
from encoder_fast.looks import can_watch
from encoder_fast.patching.head import told_of
from encoder_fast.patching.locate import original_class
from encoder_fast.patching.memory import Memory
from encoder_fast.patching.own import (
    SENTENCE,
    own_forward,
    own_method,
    unknown_part,
    unknown_parts,
    watcher_of,
)
from encoder_fast.patching.sentence import (
    AFTER_POOLING,
    container_encoding,
    is_expanding,
    pooling_modes,
    pools_first_token,
)

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
    *("ModernVBertForSequenceClassification", "UltraVBertForSequenceClassification"),
}

# What these return has the states of all tokens, for whatever calls them.
_HANDING_ON = {"ModernVBertModel", "UltraVBertModel"}

# Their forwards hand on what the module in them returns.
_WRAPPERS = ("torch.", "peft.", "accelerate.")


@dataclass(slots=True)
class Readers:
    """Who reads what one call returns, in a report's words.

    Attributes:
        of_padding: what reads padding as if it were text, or may do so.
        of_first_column: what may read the first column, padding or not.
        own: the user's own code that may read padding.
        expanding: transformers above the encoder that may expand queries.
        labels: of a loss that reads padding where they are not -100, and whose loss it is.
    """

    of_padding: str | None = None
    of_first_column: str | None = None
    own: list[str] = field(default_factory=list)
    labels: tuple[Tensor, str] | None = None
    expanding: list[weakref.ref[nn.Module]] = field(default_factory=list)

    def add_own(self, name: str, first_column: bool = True) -> None:
        """Note code of the user's own, which may read the first column as the text, too."""
        if name not in self.own:
            self.own.append(name)
        if first_column:
            self.add_first_column(name)

    def add_first_column(self, name: str) -> None:
        self.of_first_column = self.of_first_column or name


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
        self._places: list[tuple[weakref.ref[nn.Module], tuple[str, ...]]] = []
        self._assumed: Readers | None = None
        self._memory: Memory[Readers] | None = None
        for root, names in places:
            if names:
                self._add(root, names)

    def _add(self, root: nn.Module, names: tuple[str, ...]) -> None:
        of_self = weakref.ref(self)

        def forget(_: object) -> None:
            if (surroundings := of_self()) is not None:
                surroundings._memory = None

        self._places.append((weakref.ref(root, forget), names))

    def places(self) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """As they were given, without modules that are gone."""
        for ref, names in self._places:
            root = ref()
            if root is not None:
                yield root, names

    def copied(self, memo: dict[int, Any], encoder: nn.Module) -> Surroundings:
        """Those of a copy of ``encoder``, in the modules that are copied with it.

        A module that holds the encoder may be copied after it, or not at all. What it reads of the
        copy is taken to be what it reads of the encoder now.
        """
        found = Surroundings(self._family, [])
        found._assumed = self._assumed
        for root, names in self.places():
            if id(root) in memo:
                found._add(memo[id(root)], names)
            else:
                found._assumed = self._read(encoder)
        return found

    def readers(self, encoder: nn.Module) -> Readers:
        """Who reads what this call of ``encoder`` returns; not to be changed."""
        told, container = told_of(encoder), container_encoding()
        first_column = None if told is None else told.first_column
        says = (first_column, None if container is None else id(container))
        memory = self._memory
        if memory is None or not memory.holds(encoder):
            self._memory = memory = self._remember(encoder)
        known = None if memory is None else memory.answers.get(says)
        if known is None:
            known = self._read(encoder)
            if memory is not None:
                memory.answers[says] = known
        is_expanded = any(
            is_expanding(one) for ref in known.expanding if (one := ref()) is not None
        )
        if not is_expanded and (told is None or (told.labels is None and not told.spans)):
            return known
        found = replace(known)
        if is_expanded:
            found.of_padding = "query expansion, which scores padding"
        if told is not None and told.spans:
            found.of_padding = f"the loss of {told.name}, which is over all positions"
        if told is not None and told.labels is not None:
            found.labels = told.labels, told.name
        return found

    def _remember(self, encoder: nn.Module) -> Memory[Readers] | None:
        """Where answers can be kept; nothing where nobody can tell cheaply that they hold."""
        ways = [_way_down(root, names, encoder) for root, names in self.places()]
        if not can_watch() or None in ways:
            return None
        above = {id(one): one for way in ways if way is not None for one in way[0]}
        readers = [one for way in ways if way is not None for one in way[1]]
        configs = []
        for one in above.values():
            if self._family.has_head(original_class(one)):
                readers += [child for child in one.children() if child is not encoder]
                configs.append(one.config)
        pooler = encoder._modules.get("pooler")
        beside = {id(m): m for one in (*readers, pooler) if one is not None for m in one.modules()}
        return Memory(encoder, list(above.values()), list(beside.values()), configs)

    def _read(self, encoder: nn.Module) -> Readers:
        found = Readers()
        watcher, pooler = watcher_of(encoder), encoder._modules.get("pooler")
        is_held = False
        for root, names in self.places():
            way = _way_down(root, names, encoder)
            if way is not None:
                is_held = True
                self._read_holder(encoder, *way, found)
                _read_behind(way[1], found)
        if not is_held:
            found.add_own(CALLER, first_column=False)
        if watcher is not None:
            found.add_own(watcher)
        if pooler is not None and (watcher := watcher_of(pooler, given=True)) is not None:
            # In a first column that is padding it sees the original's state.
            found.add_own(watcher, first_column=False)
        if self._assumed is not None:
            found.of_padding = found.of_padding or self._assumed.of_padding
            found.of_first_column = found.of_first_column or self._assumed.of_first_column
            for name in self._assumed.own:
                found.add_own(name, first_column=False)
        return found

    def _read_holder(
        self, encoder: nn.Module, above: list[nn.Module], behind: list[nn.Module], found: Readers
    ) -> None:
        """What the modules that the encoder's output is handed to do with it."""
        found.expanding += [
            weakref.ref(one) for one in above if hasattr(type(one), "query_expansion")
        ]
        for module in reversed(above):
            cls = original_class(module)
            if self._family.has_head(cls):
                self._read_head(encoder, module, cls, found)
                return
            if not is_library_code(cls.forward, ("transformers.", *_WRAPPERS, *SENTENCE)):
                found.add_own(cls.__name__)
                return
            if (watcher := watcher_of(module)) is not None:
                found.add_own(watcher)
            if container_encoding() is module:
                return
            if is_library_code(cls.forward, SENTENCE):
                if not isinstance(module, nn.Sequential) and (own := own_method(module)):
                    found.add_own(own)
            elif not is_library_code(cls.forward, _WRAPPERS):
                if cls.__name__ in _FIRST_COLUMN_MODELS:
                    found.add_first_column(cls.__name__)
                elif cls.__name__ not in _MASKING_MODELS:
                    found.of_padding = f"{cls.__name__}, which {_UNKNOWN}"
                if cls.__name__ not in _HANDING_ON:
                    return
        found.add_own(CALLER, first_column=False)

    def _read_head(self, encoder: nn.Module, head: nn.Module, cls: Any, found: Readers) -> None:
        told, has_pooler = told_of(encoder), getattr(encoder, "pooler", None) is not None
        if told is None:
            # It may be traced, or called through a forward that goes around what is patched.
            is_reading = self._family.reads_first_column(cls, head)
            if "forward" in head.__dict__ and self._family.answers_questions(cls):
                found.of_padding = f"{cls.__name__}, whose forward was replaced before patch()"
            if (own := own_forward(head)) is not None:
                found.add_own(own)
            elif "forward" not in head.__dict__:
                found.add_own(CALLER, first_column=False)
        else:
            is_reading = told.first_column
        if is_reading and not has_pooler:
            found.add_first_column(cls.__name__)
        if not (has_pooler and self._family.reads_first_column(cls, head)):
            for child in head.children():
                if child is not encoder:
                    _note(unknown_part(child), found)


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


def _read_behind(modules: Iterable[nn.Module], found: Readers) -> None:
    """What modules that run after the encoder do with its output."""
    for module in modules:
        if (watcher := watcher_of(module, given=True)) is not None:
            found.add_own(watcher)
        if _hands_on(module):
            _read_behind(module.children(), found)
        else:
            _read_module(module, found)


def _hands_on(module: nn.Module) -> bool:
    """Whether it gives what it is given to the modules in it, and does nothing else."""
    cls = original_class(module)
    if isinstance(module, nn.Sequential | nn.ModuleDict):
        return is_library_code(cls.forward, ("torch.", *SENTENCE))
    return cls.__name__ in ("Router", "Asym") and own_method(module) is None


def _read_module(module: nn.Module, found: Readers) -> None:
    """What a module that runs after the encoder does with its output, if nobody looks at it."""
    cls = original_class(module)
    names = {base.__name__ for base in cls.__mro__ if base.__module__.startswith(SENTENCE)}
    default = "sentence_embedding" if cls.__name__ in AFTER_POOLING else None
    if is_library_code(cls.forward, SENTENCE) and _IGNORE_PADDING.isdisjoint(names):
        what = "reads padding" if cls.__name__ in _READ_PADDING else _UNKNOWN
        found.of_padding = f"{cls.__name__}, which {what}"
    elif (own := own_method(module)) is not None:
        found.add_own(own)
    elif getattr(module, "module_input_name", default) != "sentence_embedding":
        _note(unknown_parts(module), found)
        if "Pooling" in names and "cls" in pooling_modes(module) and not pools_first_token():
            found.add_first_column(cls.__name__)


def _note(parts: Iterable[tuple[str, bool]], found: Readers) -> None:
    for name, is_own in parts:
        if is_own:
            found.add_own(name)
        else:
            found.of_padding = f"{name}, which {_UNKNOWN}"


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
