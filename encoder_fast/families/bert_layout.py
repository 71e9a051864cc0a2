"""The layout that BERT's direct descendants share: module names, layer order, embeddings.

transformers repeats BERT's classes under each descendant's name; reading one of them is reading
them all, with another prefix.
"""

from __future__ import annotations

from typing import Any, Literal

from encoder_fast.errors import UnsupportedModelError
from encoder_fast.families.family import (
    check_heads,
    expect,
    expect_default_ids,
    expect_embedding,
    expect_layer_norm,
    expect_linear,
    read_activation,
)
from encoder_fast.spec import EmbeddingSpec, LayerSpec, SoftmaxAttention


def check_absolute_positions(*objects: Any) -> None:
    """Refuse the relative position embeddings that transformers 4 could add to attention.

    The config says so, and then each module for itself.
    """
    for one in objects:
        kind = getattr(one, "position_embedding_type", None) or "absolute"
        if kind != "absolute":
            raise UnsupportedModelError(f"position_embedding_type={kind!r} has no fast path")


def read_embeddings(
    embeddings: Any,
    name: str,
    *,
    position_padding_idx: int | None = None,
    projection: Any = None,
    normed: bool = True,
) -> EmbeddingSpec:
    """Embeddings of class ``name``: word, position and token type, then LayerNorm if ``normed``."""
    expect(embeddings, name)
    check_absolute_positions(embeddings)
    if position_padding_idx is None:
        expect_default_ids(embeddings)
    return EmbeddingSpec(
        word=expect_embedding(embeddings.word_embeddings),
        position=expect_embedding(embeddings.position_embeddings),
        token_type=expect_embedding(embeddings.token_type_embeddings),
        norm=expect_layer_norm(embeddings.LayerNorm) if normed else None,
        position_padding_idx=position_padding_idx,
        projection=None if projection is None else expect_linear(projection),
    )


def read_layers(
    encoder: Any, prefix: str, norm_order: Literal["post", "pre"] = "post"
) -> tuple[LayerSpec, ...]:
    """The layers of a ``<prefix>Encoder``."""
    expect(encoder, f"{prefix}Encoder")
    return tuple(_read_layer(layer, prefix, norm_order) for layer in encoder.layer)


def check_pooler(model: Any, name: str) -> None:
    """Refuse a pooler of any class but ``name``: what it reads of padded columns is not known."""
    if model.pooler is not None:
        expect(model.pooler, name)


def _read_layer(layer: Any, prefix: str, norm_order: Literal["post", "pre"]) -> LayerSpec:
    expect(layer, f"{prefix}Layer")
    expect(layer.attention, f"{prefix}Attention")
    attention = expect(layer.attention.self, f"{prefix}SelfAttention", f"{prefix}SdpaSelfAttention")
    check_absolute_positions(attention)
    check_heads(attention, attention.attention_head_size, expect_linear(attention.query))
    if getattr(layer.attention, "is_cross_attention", False):
        raise UnsupportedModelError("cross-attention has no fast path")
    attention_out = expect(layer.attention.output, f"{prefix}SelfOutput")
    ffn_in = expect(layer.intermediate, f"{prefix}Intermediate")
    ffn_out = expect(layer.output, f"{prefix}Output")
    if norm_order == "pre":
        attention_norm, ffn_norm = layer.attention.self_attn_layer_norm, layer.LayerNorm
    else:
        attention_norm, ffn_norm = attention_out.LayerNorm, ffn_out.LayerNorm
    return LayerSpec(
        projections=(
            expect_linear(attention.query),
            expect_linear(attention.key),
            expect_linear(attention.value),
        ),
        attention=SoftmaxAttention(attention, attention.attention_head_size),
        attention_out=expect_linear(attention_out.dense),
        attention_norm=expect_layer_norm(attention_norm),
        ffn_in=expect_linear(ffn_in.dense),
        activation=read_activation(ffn_in.intermediate_act_fn),
        ffn_out=expect_linear(ffn_out.dense),
        ffn_norm=expect_layer_norm(ffn_norm),
    )
