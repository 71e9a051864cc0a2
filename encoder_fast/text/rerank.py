"""The order that a cross-encoder gives to texts for a query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from encoder_fast.text.keys import ACTIVATIONS, WHOLE, check

Activation: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Ranked:
    """A text's place in a ranking.

    Attributes:
        index: its place among the texts that were given.
        score: higher is better.
        text: the text itself.
    """

    index: int
    score: float
    text: str


def activate(logits: Tensor, activation: Activation | None, config: Any) -> Tensor:
    """Scores ``(B,)`` from the logits of a cross-encoder.

    Args:
        activation: what its settings say, or ``None``: then its configuration, where versions of
            sentence-transformers before 6 note it, or a sigmoid.

    Raises:
        ValueError: it has several outputs.
        ModelFilesError: the configuration names an activation that is not known.
    """
    if logits.shape[1] != 1:
        raise ValueError(
            f"a cross-encoder scores by one output, and this model has {logits.shape[1]}"
        )
    scores = (activation or _by_config(config))(logits)
    if scores.numel() != len(logits):
        raise ValueError(
            f"the activation makes scores of shape {tuple(scores.shape)} of {len(logits)} logits"
        )
    return scores.reshape(-1).float()


def _by_config(config: Any) -> Activation:
    own = getattr(config, "sentence_transformers", None)
    name = own.get("activation_fn") if isinstance(own, dict) else None
    if name is None:
        name = getattr(config, "sbert_ce_default_activation_function", None)
    if name is None:
        return torch.sigmoid
    check({"activation_fn": name}, WHOLE["CrossEncoder"], "config.json")
    return ACTIVATIONS[name]
