"""RoBERTa (Liu et al. 2019, https://arxiv.org/abs/1907.11692) and its twins by another name:
XLM-RoBERTa (https://arxiv.org/abs/1911.02116) and CamemBERT (https://arxiv.org/abs/1911.03894).

BERT's layers. Positions count the ids that are not padding, from ``padding_idx + 1``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from encoder_fast.families.bert_layout import (
    check_absolute_positions,
    check_pooler,
    read_embeddings,
    read_layers,
)
from encoder_fast.families.family import Family
from encoder_fast.spec import EncoderSpec


def read(model: Any, prefix: str) -> EncoderSpec:
    """Read a ``<prefix>Model``."""
    check_absolute_positions(model.config, model)
    check_pooler(model, f"{prefix}Pooler")
    embeddings = model.embeddings
    return EncoderSpec(
        embeddings=read_embeddings(
            embeddings, f"{prefix}Embeddings", position_padding_idx=embeddings.padding_idx
        ),
        layers=read_layers(model.encoder, prefix),
    )


def _family(name: str, prefix: str) -> Family:
    return Family(
        name=name,
        module=f"transformers.models.{name}.modeling_{name}",
        class_names=(f"{prefix}Model",),
        output_class="BaseModelOutputWithPoolingAndCrossAttentions",
        stack=("embeddings", "encoder"),
        read=partial(read, prefix=prefix),
        first_token_heads={
            f"{prefix}ForSequenceClassification": f"{prefix}ClassificationHead",
            f"{prefix}ForMultipleChoice": None,
        },
    )


FAMILIES = (
    _family("roberta", "Roberta"),
    _family("xlm_roberta", "XLMRoberta"),
    _family("camembert", "Camembert"),
)
