"""Tokens of texts without special tokens, and the template that puts those around them.

Texts are tokenised bare and once. Cutting and chunking are then slices of an array, and a row for
the model is the template's special tokens around a slice.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

# Something that any vocabulary has tokens for, to see what special tokens are put around it.
_PROBES = ("a", ".", "1", "C")

# What sentencepiece and byte-level tokenizers put in place of a space.
_SPACES = ("\u2581", "\u0120")

UNLIMITED = 1_000_000
"""A ``model_max_length`` above this is a tokenizer's way to say that it has none."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one text.

    Attributes:
        ids: int64 ``(n,)``.
        offsets: int64 ``(n, 2)``, the characters that each token covers; ``None`` if not asked for.
    """

    ids: np.ndarray
    offsets: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence for the model: ids and token types, int64 ``(n,)``; no types means zeros."""

    ids: np.ndarray
    types: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Template:
    """The special tokens around one text, or around and between two.

    Attributes:
        specials: the ids before, between and after the texts, one array more than there are texts.
        types: token types in the order special, text, special …: an array for special tokens, a
            number for a text; ``None`` where the model has no use for them.
    """

    specials: tuple[np.ndarray, ...]
    types: tuple[np.ndarray | int, ...] | None

    @property
    def size(self) -> int:
        """The number of special tokens."""
        return sum(map(len, self.specials))

    def row(self, *texts: np.ndarray) -> Row:
        """The special tokens around the ids of each text."""
        parts = [self.specials[0]]
        for ids, special in zip(texts, self.specials[1:], strict=True):
            parts += [ids, special]
        if self.types is None:
            return Row(np.concatenate(parts), None)
        types = [
            np.full(len(part), kind) if isinstance(kind, int) else kind
            for part, kind in zip(parts, self.types, strict=True)
        ]
        return Row(np.concatenate(parts), np.concatenate(types))


class Tokeniser:
    """A Hugging Face tokenizer, read once.

    A fast one is copied: what others set on theirs (padding, truncation) does not reach this one,
    and threads may share it. A slow one, pure Python, is called as it is and knows no offsets.
    """

    def __init__(self, tokenizer: Any, *, lower_case: bool = False) -> None:
        self._slow = tokenizer
        self._fast: Any = None
        self._lower_case = lower_case
        if getattr(tokenizer, "is_fast", False):
            self._fast = copy.deepcopy(tokenizer.backend_tokenizer)
            self._fast.no_truncation()
            self._fast.no_padding()
            if lower_case:
                self._put_lower_case_first()
        self.truncation_side = getattr(tokenizer, "truncation_side", "right")
        limit = getattr(tokenizer, "model_max_length", None)
        self.max_length = int(limit) if limit is not None and limit <= UNLIMITED else None
        self._uses_types = "token_type_ids" in getattr(tokenizer, "model_input_names", ())

    @property
    def has_offsets(self) -> bool:
        return self._fast is not None

    @property
    def space_ids(self) -> np.ndarray:
        """The ids of tokens that stand for a space and nothing else, int64 ``(n,)``.

        Their offsets don't tell: one that was put before a word has those of the word's first
        character.
        """
        if self._fast is None:
            return np.zeros(0, dtype=np.int64)
        ids = [self._fast.token_to_id(space) for space in _SPACES]
        return np.array([i for i in ids if i is not None], dtype=np.int64)

    def _put_lower_case_first(self) -> None:
        from tokenizers.normalizers import Lowercase, Sequence

        rest = self._fast.normalizer
        self._fast.normalizer = Sequence([Lowercase()] if rest is None else [Lowercase(), rest])

    def tokens(self, texts: list[str], *, detail: bool = False) -> list[Tokens]:
        """Tokenise, without special tokens; with offsets where ``detail`` is set."""
        if self._fast is None:
            return [Tokens(np.array(ids, dtype=np.int64)) for ids in self._call_slow(texts)]
        if not detail:
            encodings = self._fast.encode_batch_fast(texts, add_special_tokens=False)
            return [Tokens(np.array(e.ids, dtype=np.int64)) for e in encodings]
        return [
            Tokens(
                np.array(e.ids, dtype=np.int64),
                np.array(e.offsets, dtype=np.int64).reshape(-1, 2),
            )
            for e in self._fast.encode_batch(texts, add_special_tokens=False)
        ]

    def names(self, ids: np.ndarray) -> list[str]:
        """The vocabulary's entries for ids."""
        return list(self._slow.convert_ids_to_tokens(ids.tolist()))

    def template(self, texts: int = 1) -> Template:
        """The special tokens around one text or two.

        Raises:
            ValueError: they can't be told from the text's own.
        """
        for probe in _PROBES:
            found = self._probe(probe, texts)
            if found is not None:
                return found
        raise ValueError(
            f"the special tokens of {type(self._slow).__name__} can't be told from a text's own"
        )

    def _probe(self, probe: str, texts: int) -> Template | None:
        ids, types = self._whole((probe,) * texts)
        content = self.tokens([probe])[0].ids.tolist()
        if not content:
            return None
        specials: list[np.ndarray] = []
        kinds: list[np.ndarray | int] = []
        done = 0
        for _ in range(texts):
            place = _find(content, ids, done)
            if place is None:
                return None
            specials.append(np.array(ids[done:place], dtype=np.int64))
            kinds += [np.array(types[done:place], dtype=np.int64), types[place]]
            done = place + len(content)
        specials.append(np.array(ids[done:], dtype=np.int64))
        kinds.append(np.array(types[done:], dtype=np.int64))
        wanted = self._uses_types and any(types)
        return Template(tuple(specials), tuple(kinds) if wanted else None)

    def _whole(self, texts: tuple[str, ...]) -> tuple[list[int], list[int]]:
        if self._fast is not None:
            encoding = self._fast.encode(*texts)
            return encoding.ids, encoding.type_ids
        output = self._slow(*texts, truncation=False, padding=False, return_token_type_ids=True)
        return output["input_ids"], output["token_type_ids"]

    def _call_slow(self, texts: list[str]) -> list[list[int]]:
        if self._lower_case:
            texts = [text.lower() for text in texts]
        options = {"add_special_tokens": False, "truncation": False, "padding": False}
        # verbose=False: that a text is longer than the model takes is said elsewhere
        return self._slow(texts, **options, verbose=False)["input_ids"]


def _find(content: list[int], ids: list[int], start: int) -> int | None:
    """Where ``content`` stands in ``ids`` from ``start`` on."""
    for place in range(start, len(ids) - len(content) + 1):
        if ids[place : place + len(content)] == content:
            return place
    return None
