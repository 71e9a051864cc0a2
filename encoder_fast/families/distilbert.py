"""DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108): BERT without token types and
pooler, under names of its own."""

from __future__ import annotations

from typing import Any

from encoder_fast.families.family import (
    Family,
    check_heads,
    expect,
    expect_default_ids,
    expect_embedding,
    expect_layer_norm,
    expect_linear,
    read_activation,
)
from encoder_fast.spec import EmbeddingSpec, EncoderSpec, LayerSpec, SoftmaxAttention


def read(model: Any) -> EncoderSpec:
    """Read a ``DistilBertModel``."""
    embeddings = expect(model.embeddings, "Embeddings")
    expect_default_ids(embeddings)
    transformer = expect(model.transformer, "Transformer")
    return EncoderSpec(
        embeddings=EmbeddingSpec(
            word=expect_embedding(embeddings.word_embeddings),
            position=expect_embedding(embeddings.position_embeddings),
            token_type=None,
            norm=expect_layer_norm(embeddings.LayerNorm),
        ),
        layers=tuple(_read_layer(layer) for layer in transformer.layer),
    )


def _read_layer(layer: Any) -> LayerSpec:
    expect(layer, "TransformerBlock")
    attention = expect(
        layer.attention,
        "DistilBertSelfAttention",
        "MultiHeadSelfAttention",
        "DistilBertSdpaAttention",
    )
    check_heads(attention, attention.attention_head_size, expect_linear(attention.q_lin))
    ffn = expect(layer.ffn, "FFN")
    return LayerSpec(
        projections=(
            expect_linear(attention.q_lin),
            expect_linear(attention.k_lin),
            expect_linear(attention.v_lin),
        ),
        attention=SoftmaxAttention(attention, attention.attention_head_size),
        attention_out=expect_linear(attention.out_lin),
        attention_norm=expect_layer_norm(layer.sa_layer_norm),
        ffn_in=expect_linear(ffn.lin1),
        activation=read_activation(ffn.activation),
        ffn_out=expect_linear(ffn.lin2),
        ffn_norm=expect_layer_norm(layer.output_layer_norm),
    )


FAMILY = Family(
    name="distilbert",
    module="transformers.models.distilbert.modeling_distilbert",
    class_names=("DistilBertModel",),
    output_class="BaseModelOutput",
    stack=("embeddings", "transformer"),
    read=read,
    first_token_heads={
        "DistilBertForSequenceClassification": None,
        "DistilBertForMultipleChoice": None,
    },
)
