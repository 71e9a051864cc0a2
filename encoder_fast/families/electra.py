"""ELECTRA (Clark et al. 2020, https://arxiv.org/abs/2003.10555): BERT's layers without a pooler;
the small ones project their embeddings to the layers' width."""

from __future__ import annotations

from typing import Any

from encoder_fast.families.bert_layout import (
    check_absolute_positions,
    read_embeddings,
    read_layers,
)
from encoder_fast.families.family import Family
from encoder_fast.spec import EncoderSpec


def read(model: Any) -> EncoderSpec:
    """Read an ``ElectraModel``, generator or discriminator."""
    check_absolute_positions(model.config, model)
    return EncoderSpec(
        embeddings=read_embeddings(
            model.embeddings,
            "ElectraEmbeddings",
            projection=getattr(model, "embeddings_project", None),
        ),
        layers=read_layers(model.encoder, "Electra"),
    )


FAMILY = Family(
    name="electra",
    module="transformers.models.electra.modeling_electra",
    class_names=("ElectraModel",),
    output_class="BaseModelOutputWithPastAndCrossAttentions",
    stack=("embeddings", "embeddings_project", "encoder"),
    read=read,
    first_token_heads={
        "ElectraForSequenceClassification": "ElectraClassificationHead",
        "ElectraForMultipleChoice": "ElectraSequenceSummary",
    },
)
