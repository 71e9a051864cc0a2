"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805): post-norm, absolute positions.

Also everything that ships as a BERT: MiniLM, BGE, E5, GTE v1, most sentence embedding models.
"""

from __future__ import annotations

from typing import Any

from encoder_fast.errors import UnsupportedModelError
from encoder_fast.families.family import (
    Family,
    expect,
    expect_embedding,
    expect_layer_norm,
    expect_linear,
    read_activation,
)
from encoder_fast.spec import EmbeddingSpec, EncoderSpec, LayerSpec


def read(model: Any) -> EncoderSpec:
    """Read a ``BertModel``."""
    position_type = getattr(model.config, "position_embedding_type", None) or "absolute"
    if position_type != "absolute":
        raise UnsupportedModelError(f"position_embedding_type={position_type!r} has no fast path")
    embeddings = expect(model.embeddings, "BertEmbeddings")
    encoder = expect(model.encoder, "BertEncoder")
    position = expect_embedding(embeddings.position_embeddings)
    return EncoderSpec(
        family="bert",
        embeddings=EmbeddingSpec(
            word=expect_embedding(embeddings.word_embeddings),
            position=position,
            token_type=expect_embedding(embeddings.token_type_embeddings),
            norm=expect_layer_norm(embeddings.LayerNorm),
        ),
        layers=tuple(_read_layer(layer) for layer in encoder.layer),
        max_positions=position.num_embeddings,
        pooler=model.pooler,
    )


def _read_layer(layer: Any) -> LayerSpec:
    expect(layer, "BertLayer")
    expect(layer.attention, "BertAttention")
    attention = expect(layer.attention.self, "BertSelfAttention", "BertSdpaSelfAttention")
    attention_out = expect(layer.attention.output, "BertSelfOutput")
    ffn_in = expect(layer.intermediate, "BertIntermediate")
    ffn_out = expect(layer.output, "BertOutput")
    return LayerSpec(
        query=expect_linear(attention.query),
        key=expect_linear(attention.key),
        value=expect_linear(attention.value),
        head_size=attention.attention_head_size,
        attention_out=expect_linear(attention_out.dense),
        attention_norm=expect_layer_norm(attention_out.LayerNorm),
        ffn_in=expect_linear(ffn_in.dense),
        activation=read_activation(ffn_in.intermediate_act_fn),
        ffn_out=expect_linear(ffn_out.dense),
        ffn_norm=expect_layer_norm(ffn_out.LayerNorm),
    )


FAMILY = Family(
    name="bert",
    module="transformers.models.bert.modeling_bert",
    class_names=("BertModel",),
    output_class="BaseModelOutputWithPoolingAndCrossAttentions",
    stack=("embeddings", "encoder"),
    read=read,
)
