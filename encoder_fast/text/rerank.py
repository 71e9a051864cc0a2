"""The order that a cross-encoder gives to texts for a query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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


def activate(logits: Tensor, config: Any) -> Tensor:
    """Scores ``(B,)`` from the logits of a cross-encoder, by the activation that its files name.

    Raises:
        ValueError: it has several outputs, or an activation that is not known.
    """
    if logits.shape[1] != 1:
        raise ValueError(
            f"a cross-encoder scores by one output, and this model has {logits.shape[1]}"
        )
    own = getattr(config, "sentence_transformers", None) or {}
    name = own.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
    kind = "Sigmoid" if name is None else name.rsplit(".", 1)[-1]
    if kind == "Sigmoid":
        logits = torch.sigmoid(logits)
    elif kind != "Identity":
        raise ValueError(f"the activation {name} of the scores is not known")
    return logits[:, 0]
