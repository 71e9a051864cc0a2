"""Labels and their probabilities from a sequence classification head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encoder_fast.errors import ModelFilesError


@dataclass(frozen=True, slots=True)
class Classification:
    """What a classifier says of one text.

    Attributes:
        label: the most probable label.
        probability: its probability.
        labels: all that apply: the most probable one or, where labels don't exclude each other,
            those with a probability of one half or more, which may be none.
        probabilities: every label's, in the model's order.
    """

    label: str
    probability: float
    labels: tuple[str, ...]
    probabilities: dict[str, float]


def is_multi_label(config: Any) -> bool:
    """Whether a model's labels don't exclude each other."""
    return config.problem_type == "multi_label_classification" or config.num_labels == 1


def classifications(logits: Tensor, config: Any) -> list[Classification]:
    """Read the logits ``(B, labels)`` of a sequence classifier."""
    names = label_names(config)
    many = is_multi_label(config)
    probabilities = torch.sigmoid(logits) if many else torch.softmax(logits, dim=-1)
    found = []
    for row in probabilities.tolist():
        best = max(range(len(names)), key=row.__getitem__)
        every = dict(zip(names, row, strict=True))
        likely = tuple(name for name, probability in every.items() if probability >= 0.5)
        labels = likely if many else (names[best],)
        found.append(Classification(names[best], row[best], labels, every))
    return found


def label_names(config: Any) -> list[str]:
    """The names of a head's outputs, in order.

    Raises:
        ModelFilesError: one has no name.
    """
    names = [config.id2label.get(index) for index in range(config.num_labels)]
    if None in names:
        raise ModelFilesError(f"config.json names no label {names.index(None)} in id2label")
    return [str(name) for name in names]
