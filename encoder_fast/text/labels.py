"""What the label names of a token classifier say: a class, and a place within an entity.

The place is a letter before or behind the class (``B-PER``, ``PER_B``, ``B.PER``), or all of the
name (``B``), or the word in place of its letter (``BEGIN-PER``):

| letter | the token is | schemes |
|---|---|---|
| B | an entity's first | BIO, BIOES, BILOU, BMES |
| I, M | inside of one | I: IO, BIO, BIOES, BILOU; M: BMES, BMEWO |
| E, L | its last | E: BIOES, BMES, BMEWO; L: BILOU |
| S, U, W | all of it | S: BIOES, BMES; U: BILOU; W: BMEWO |

A name may look like that and mean something else (``E-mail``, ``T-cell`` beside ``B-cell``), so the
set of names decides and never a name alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

OUTSIDE = -1

_PLACE = "(?P<place>BEGIN|INSIDE|MIDDLE|END|LAST|SINGLE|UNIT|WHOLE|[BIMELSUW])"
_BEFORE = re.compile(rf"{_PLACE}(?:[-_.:/](?P<name>.+))?", re.IGNORECASE | re.DOTALL)
_BEHIND = re.compile(rf"(?P<name>.+)[-_.:/]{_PLACE}", re.IGNORECASE | re.DOTALL)
_SCHEMES = tuple(map(frozenset, ("BIES", "BILU", "BMES", "BMEW")))
_PAIRS = tuple(map(frozenset, ("BI", "BM")))
# What O is called elsewhere; read without case, spaces, hyphens and underscores.
_NO_ENTITY = re.compile("0|out(side)?|others?|none?|null|nothing|no(n|t)?entity|background")
# Beside a scheme: what tokens get that training leaves out.
_FILLER = re.compile(r"\[.*\]|<.*>|x|pad|unk", re.IGNORECASE)

_Places = dict[str, tuple[str, str]]
"""The place and the class that a label's name holds."""


@dataclass(frozen=True, slots=True)
class Labels:
    """A token classifier's labels, read.

    Attributes:
        names: as the model has them.
        classes: the names of the classes.
        class_of: int64 ``(labels,)``, the place in ``classes``, or ``OUTSIDE``.
        begins, ends: bool ``(labels,)``, whether an entity begins or ends at such a token.
    """

    names: list[str]
    classes: list[str]
    class_of: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


def read_labels(names: list[str]) -> Labels:
    """Find out which scheme a model's label names follow, and which of them is no entity."""
    outside = _outside(names)
    fillers = {name for name in names if _FILLER.fullmatch(name)}
    inside = [name for name in names if name not in outside | fillers]
    places = _places(inside, spare=0 if outside else 1)
    bare = [name for name in inside if name not in places]
    if places and not outside and len(bare) == 1:
        outside = {bare[0]}
    if places:
        outside = outside | fillers
    read = [places.get(name, ("", name)) for name in names]
    classes = list(
        dict.fromkeys(
            label for name, (_, label) in zip(names, read, strict=True) if name not in outside
        )
    )
    class_of = [
        OUTSIDE if name in outside else classes.index(label)
        for name, (_, label) in zip(names, read, strict=True)
    ]
    return Labels(
        names,
        classes,
        np.array(class_of, dtype=np.int64),
        np.array([place in {"B", "S", "U", "W"} for place, _ in read], dtype=bool),
        np.array([place in {"E", "L", "S", "U", "W"} for place, _ in read], dtype=bool),
    )


def _outside(names: list[str]) -> set[str]:
    """The names that say by themselves that a token is part of no entity."""
    for said in (
        {name for name in names if name == "O"},
        {name for name in names if name.casefold() == "o"},
    ):
        if said:
            return said
    bare = {name: re.sub(r"[-_\s]", "", name.casefold()) for name in names}
    return {name for name in names if _NO_ENTITY.fullmatch(bare[name])}


def _places(names: list[str], spare: int) -> _Places:
    """What the names hold, by the reading that explains more of them with fewer classes."""
    readings = [_reading(names, pattern, spare) for pattern in (_BEFORE, _BEHIND)]
    return max(readings, key=lambda places: (len(places), -len(_by_class(places))))


def _reading(names: list[str], pattern: re.Pattern[str], spare: int) -> _Places:
    """The names that hold a place by ``pattern``; ``spare`` of all may be without one."""
    matches = {name: pattern.fullmatch(name) for name in names}
    found = {
        name: (match["place"][0].upper(), match["name"] or "")
        for name, match in matches.items()
        if match is not None
    }
    of_class = _by_class(found)
    without = len(matches) - len(found)
    if without <= spare and _is_scheme(of_class, certain=without > 0 or pattern is _BEHIND):
        return found
    # Among other names the classes that have both a beginning and an inside are beyond doubt.
    return {
        name: (place, label)
        for name, (place, label) in found.items()
        if any(pair <= of_class[label] for pair in _PAIRS)
    }


def _by_class(found: _Places) -> Mapping[str, set[str]]:
    """The places that each class comes with."""
    of_class: dict[str, set[str]] = defaultdict(set)
    for place, label in found.values():
        of_class[label].add(place)
    return of_class


def _is_scheme(of_class: Mapping[str, set[str]], certain: bool) -> bool:
    """Whether the places make up a scheme, and are no accident of names.

    Args:
        certain: ask for a class with two places or more. "hepatitis-B" is more usual than a place
            behind a class, and so is "B-cell" beside a "T-cell".
    """
    letters = set().union(*of_class.values())
    shared = set().union(*(places for places in of_class.values() if len(places) > 1))
    if not letters & {"B", "I"} or not any(letters <= scheme for scheme in _SCHEMES):
        return False
    # "vitamin-B" and "vitamin-E": a scheme with an end has an inside or single tokens too.
    if letters in ({"B", "E"}, {"B", "L"}) or (certain and not shared):
        return False
    # a name that is the letter alone
    if len(of_class.get("", "BI")) == 1:
        return False
    alone = {place for places in of_class.values() if len(places) == 1 for place in places}
    all_of_it = {"S", "U", "W"}
    singles = all_of_it if letters & {"E", "L"} else shared & all_of_it
    return alone <= {"B", "I"} | singles
