"""Which tokens make up a word, told by the text and not by the tokenizer.

Tokenizers don't agree on words: for some a word is what stands between two spaces, for others all
of a text. Here letters and digits that follow each other are one word, and any other character is
one by itself. So are the letters of scripts that put no spaces between words, and those of Korean,
which puts none before particles: there a token is the smallest unit. No character is ever divided.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np

# The kinds of a character. One that extends belongs to the character before it.
_OTHER, _LETTER, _EXTENDS, _SPACE = range(4)

_ZERO_WIDTH_JOINER = 0x200D

# First and last code points. Ideographs beyond U+20000 are _OTHER without being listed.
_WITHOUT_SPACES = (
    (0x0E00, 0x109F),  # Thai, Lao, Tibetan, Burmese
    (0x1100, 0x11FF),  # Hangul
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x1AAF),  # Tai, Buginese
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0xA4CF),  # ideographs, kana, bopomofo, Yi
    (0xA960, 0xA9FF),  # Hangul, Javanese, Burmese
    (0xAA60, 0xAADF),  # Burmese, Tai Viet
    (0xAC00, 0xD7FF),  # Hangul
    (0xF900, 0xFAFF),  # ideographs
    (0xFF66, 0xFFDC),  # halfwidth kana and Hangul
    (0x1AFF0, 0x1B16F),  # kana
)
_EXTENDING = ((0x1160, 0x11FF), (0xD7B0, 0xD7FF), (0x1F3FB, 0x1F3FF))  # Hangul vowels, skin tones


class Words:
    """The characters of a text, by word."""

    def __init__(self, text: str) -> None:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        kinds = _kinds()[codes]
        places = np.arange(len(codes), dtype=np.int32)
        extends = kinds == _EXTENDS
        extended = kinds[np.maximum.accumulate(np.where(extends, 0, places))]
        goes_on = extends.copy()
        goes_on[1:] |= (kinds[1:] == _LETTER) & (extended[:-1] == _LETTER)
        goes_on[1:] |= codes[:-1] == _ZERO_WIDTH_JOINER
        self._word_of = np.cumsum(~goes_on, dtype=np.int32)
        self._visible = np.cumsum(np.append(False, kinds != _SPACE), dtype=np.int32)

    def blank(self, offsets: np.ndarray) -> np.ndarray:
        """Which tokens cover no character but spaces, ``(n,)``."""
        return self._visible[offsets[:, 0]] == self._visible[offsets[:, 1]]

    def starts(self, offsets: np.ndarray, blank: np.ndarray) -> np.ndarray:
        """Which tokens begin a word, ``(n,)``.

        A blank one begins the word of the token behind it: for some tokenizers that is where the
        word's own first token is.
        """
        starts, stops = offsets.T
        inside = self._word_of[starts[1:].clip(max=len(self._word_of) - 1)]
        before = self._word_of[(stops[:-1] - 1).clip(min=0)]
        # tokens overlap where they are parts of one character
        joined = (inside == before) | (starts[1:] < stops[:-1])
        return np.concatenate([[True], ~(joined | blank[:-1])])


@cache
def _kinds() -> np.ndarray:
    """The kind of each code point, uint8."""
    kinds = np.full(0x110000, _OTHER, dtype=np.uint8)
    # In between there are ideographs and nothing else.
    for codes in (range(0x20000), range(0xE0000, 0xE0200)):
        kinds[codes.start : codes.stop] = [_kind(chr(code)) for code in codes]
    for first, last in _WITHOUT_SPACES:
        listed = kinds[first : last + 1]
        listed[listed == _LETTER] = _OTHER
    for first, last in _EXTENDING:
        kinds[first : last + 1] = _EXTENDS
    return kinds


def _kind(character: str) -> int:
    category = unicodedata.category(character)
    if character.isspace():
        return _SPACE
    if category[0] in "LN":
        return _LETTER
    # Marks, and signs without a width.
    return _EXTENDS if category[0] == "M" or category == "Cf" else _OTHER
