"""XLM-RoBERTa-XL and -XXL (Goyal et al. 2021, https://arxiv.org/abs/2105.00572): RoBERTa's
positions, layers that normalise ahead of each half, and one norm after the last of them instead of
one after the embeddings."""

from __future__ import annotations

from typing import Any

from encoder_fast.families.bert_layout import (
    check_absolute_positions,
    check_pooler,
    read_embeddings,
    read_layers,
)
from encoder_fast.families.family import Family, expect_layer_norm, last_state_is_normed
from encoder_fast.spec import EncoderSpec


def read(model: Any) -> EncoderSpec:
    """Read an ``XLMRobertaXLModel``."""
    check_absolute_positions(model.config, model)
    check_pooler(model, "XLMRobertaXLPooler")
    embeddings = model.embeddings
    return EncoderSpec(
        embeddings=read_embeddings(
            embeddings,
            "XLMRobertaXLEmbeddings",
            position_padding_idx=embeddings.padding_idx,
            normed=False,
        ),
        layers=read_layers(model.encoder, "XLMRobertaXL", norm_order="pre"),
        norm_order="pre",
        final_norm=expect_layer_norm(model.encoder.LayerNorm),
        normed_last_state=last_state_is_normed(model),
    )


FAMILY = Family(
    name="xlm_roberta_xl",
    module="transformers.models.xlm_roberta_xl.modeling_xlm_roberta_xl",
    class_names=("XLMRobertaXLModel",),
    output_class="BaseModelOutputWithPoolingAndCrossAttentions",
    stack=("embeddings", "encoder"),
    read=read,
    first_token_heads={
        "XLMRobertaXLForSequenceClassification": "XLMRobertaXLClassificationHead",
        "XLMRobertaXLForMultipleChoice": None,
    },
)
