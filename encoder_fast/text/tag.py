"""Named entities from a token classification head.

Tokens, or words of tokens, are labelled; neighbours of one class are one entity, unless their
labels say that one begins or ends between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from encoder_fast.text.labels import OUTSIDE, Labels
from encoder_fast.text.tokenising import Tokens
from encoder_fast.text.words import Words


@dataclass(frozen=True, slots=True)
class Entity:
    """A stretch of text with a label.

    Attributes:
        label: the class, without the letter for a place in front or behind (``B-PER``); with
            ``aggregation_strategy="none"`` the label as the model has it.
        text: the characters ``start:stop`` of the text.
        probability: the mean over its words, or over its tokens where these are not put together.
    """

    label: str
    text: str
    start: int
    stop: int
    probability: float


def _first(probabilities: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _most_probable(probabilities[starts])


def _average(probabilities: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts = np.diff(starts, append=len(probabilities))
    return _most_probable(np.add.reduceat(probabilities, starts) / counts[:, None])


def _max(probabilities: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    best, scores = _most_probable(probabilities)
    word = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(scores)))
    # by word, and in it by probability; the first of equals
    surest = np.lexsort((-scores, word))[starts]
    return best[surest], scores[surest]


def _most_probable(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    best = probabilities.argmax(axis=1)
    return best, probabilities[np.arange(len(best)), best]


_WORD_LABELS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "first": _first,
    "average": _average,
    "max": _max,
}
STRATEGIES = ("none", "simple", *_WORD_LABELS)


def check_strategy(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is an aggregation strategy."""
    if name not in STRATEGIES:
        raise ValueError(f"aggregation_strategy must be one of {STRATEGIES}, got {name!r}")


def entities(
    text: str,
    tokens: Tokens,
    probabilities: np.ndarray,
    labels: Labels,
    strategy: str,
    spaces: np.ndarray,
) -> list[Entity]:
    """Read the probabilities ``(n, labels)`` of a text's tokens.

    Args:
        spaces: the ids of tokens that stand for a space, whatever their offsets are.
    """
    assert tokens.offsets is not None
    if not len(tokens.ids):
        return []
    best, scores = _most_probable(probabilities)
    offsets = tokens.offsets
    if strategy in _WORD_LABELS:
        words = Words(text)
        blank = words.blank(offsets) | np.isin(tokens.ids, spaces)
        # A space has no say in whether the word behind it, or around it, is an entity.
        kept = np.flatnonzero(~blank | (labels.class_of[best] != OUTSIDE))
        if not len(kept):
            return []
        offsets = offsets[kept]
        starts = np.flatnonzero(words.starts(offsets, blank[kept]))
        best, scores = _WORD_LABELS[strategy](probabilities[kept], starts)
        offsets = np.stack(
            [offsets[starts, 0], offsets[np.append(starts[1:], len(kept)) - 1, 1]], 1
        )
    class_of = labels.class_of[best]
    fresh = np.ones(len(best), dtype=bool)
    if strategy != "none":
        fresh[1:] = class_of[1:] != class_of[:-1]
        fresh[1:] |= labels.begins[best[1:]] | labels.ends[best[:-1]]
    firsts = np.flatnonzero(fresh)
    lasts = np.append(firsts[1:], len(best)) - 1
    means = np.add.reduceat(scores, firsts, dtype=np.float64) / (lasts - firsts + 1)
    names = labels.names if strategy == "none" else labels.classes
    said = best if strategy == "none" else class_of
    found = []
    for group in np.flatnonzero(class_of[firsts] != OUTSIDE).tolist():
        first, last = firsts[group], lasts[group]
        start, stop = _without_spaces(text, int(offsets[first, 0]), int(offsets[last, 1]))
        if start < stop:
            found.append(
                Entity(names[said[first]], text[start:stop], start, stop, float(means[group]))
            )
    return found


def _without_spaces(text: str, start: int, stop: int) -> tuple[int, int]:
    """What is left of ``start:stop``; some tokenizers count a space before a word as its own."""
    covered = text[start:stop]
    return stop - len(covered.lstrip()), start + len(covered.rstrip())
