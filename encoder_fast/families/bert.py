"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805): post-norm, absolute positions.

Also everything that ships as a BERT: MiniLM, BGE, E5, GTE v1, most sentence embedding models.
"""

from __future__ import annotations

from typing import Any

from encoder_fast.families.bert_layout import (
    check_absolute_positions,
    check_pooler,
    read_embeddings,
    read_layers,
)
from encoder_fast.families.family import Family
from encoder_fast.spec import EncoderSpec


def read(model: Any) -> EncoderSpec:
    """Read a ``BertModel``."""
    check_absolute_positions(model.config, model)
    check_pooler(model, "BertPooler")
    return EncoderSpec(
        embeddings=read_embeddings(model.embeddings, "BertEmbeddings"),
        layers=read_layers(model.encoder, "Bert"),
    )


FAMILY = Family(
    name="bert",
    module="transformers.models.bert.modeling_bert",
    class_names=("BertModel",),
    output_class="BaseModelOutputWithPoolingAndCrossAttentions",
    stack=("embeddings", "encoder"),
    read=read,
    first_token_heads={
        "BertForSequenceClassification": None,
        "BertForMultipleChoice": None,
        "BertForNextSentencePrediction": None,
    },
)
