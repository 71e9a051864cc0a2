"""Named entities from a token classification head.

A word is labelled as a whole, by the mean of its tokens' probabilities; words with one label that
follow each other are one entity. Labels may be bare (``PER``) or carry a position, ``B-PER``
beginning an entity and ``I-PER`` going on with it; ``O`` is no entity.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from encoder_fast.text.tokenising import Tokens

OUTSIDE = "O"


@dataclass(frozen=True, slots=True)
class Entity:
    """A stretch of text with a label.

    Attributes:
        label: without a prefix ``B-`` or ``I-``.
        text: the characters ``start:stop`` of the text.
        probability: the mean over its words.
    """

    label: str
    text: str
    start: int
    stop: int
    probability: float


@dataclass(frozen=True, slots=True)
class _Word:
    start: int
    stop: int
    begins: bool
    label: str
    probability: float


def entities(
    text: str, tokens: Tokens, probabilities: np.ndarray, names: list[str]
) -> list[Entity]:
    """Read the probabilities ``(n, labels)`` of a text's tokens."""
    groups: list[list[_Word]] = []
    last: _Word | None = None
    for word in _words(tokens, probabilities, names):
        if word.label != OUTSIDE:
            if last is not None and last.label == word.label and not word.begins:
                groups[-1].append(word)
            else:
                groups.append([word])
        last = word
    return [_entity(text, group) for group in groups]


def _entity(text: str, words: list[_Word]) -> Entity:
    start, stop = words[0].start, words[-1].stop
    # some tokenizers count the space before a word as its first character
    start += len(text[start:stop]) - len(text[start:stop].lstrip())
    probability = sum(word.probability for word in words) / len(words)
    return Entity(words[0].label, text[start:stop], start, stop, probability)


def _words(tokens: Tokens, probabilities: np.ndarray, names: list[str]) -> list[_Word]:
    assert tokens.offsets is not None and tokens.words is not None
    # a token that belongs to no word is a word by itself
    starts = np.flatnonzero((np.diff(tokens.words, prepend=-2) != 0) | (tokens.words < 0))
    words = []
    for first, end in pairwise([*starts.tolist(), len(tokens.words)]):
        mean = probabilities[first:end].mean(axis=0)
        best = int(mean.argmax())
        begins, label = _read_label(names[best])
        start, stop = int(tokens.offsets[first, 0]), int(tokens.offsets[end - 1, 1])
        words.append(_Word(start, stop, begins, label, float(mean[best])))
    return words


def _read_label(name: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and the entity's own label."""
    if name[:2] in ("B-", "I-"):
        return name[0] == "B", name[2:]
    return False, name
