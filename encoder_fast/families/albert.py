"""ALBERT (Lan et al. 2019, https://arxiv.org/abs/1909.11942): few layers, each run many times, over
embeddings that are narrower than they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from encoder_fast.errors import UnsupportedModelError
from encoder_fast.families import family
from encoder_fast.families.bert_layout import (
    check_absolute_positions,
    check_pooler,
    read_embeddings,
)
from encoder_fast.families.family import (
    Family,
    check_heads,
    expect,
    expect_layer_norm,
    expect_linear,
    read_activation,
)
from encoder_fast.spec import EncoderSpec, LayerSpec, SoftmaxAttention


def read(model: Any) -> EncoderSpec:
    """Read an ``AlbertModel``."""
    config = model.config
    check_absolute_positions(config, model)
    check_pooler(model, "Linear")
    encoder: Any = expect(model.encoder, "AlbertTransformer")
    layers = [_read_group(group) for group in encoder.albert_layer_groups]
    passes, groups = _passes(encoder.config)
    if not 0 < groups <= len(layers):
        raise UnsupportedModelError(f"num_hidden_groups={groups} of {len(layers)} groups")
    return EncoderSpec(
        embeddings=read_embeddings(
            model.embeddings, "AlbertEmbeddings", projection=encoder.embedding_hidden_mapping_in
        ),
        layers=tuple(layers[int(i / (passes / groups))] for i in range(passes)),
    )


def facts(model: Any) -> tuple:
    """Beside those of all families, what the encoder's own config says."""
    return (*family.facts(model), *_passes(model.encoder.config))


def _passes(config: Any) -> tuple[int, int]:
    """How often layers run, and how many groups of them there are."""
    return config.num_hidden_layers, config.num_hidden_groups


def pool(model: Any, hidden: Tensor) -> Tensor:
    """ALBERT keeps the two halves of its pooler apart."""
    return model.pooler_activation(model.pooler(hidden[:, 0]))


def _read_group(group: Any) -> LayerSpec:
    expect(group, "AlbertLayerGroup")
    if len(group.albert_layers) != 1:
        raise UnsupportedModelError(f"inner_group_num={len(group.albert_layers)} has no fast path")
    layer = expect(group.albert_layers[0], "AlbertLayer")
    attention = expect(layer.attention, "AlbertAttention", "AlbertSdpaAttention")
    check_absolute_positions(attention)
    check_heads(attention, attention.attention_head_size, expect_linear(attention.query))
    return LayerSpec(
        projections=(
            expect_linear(attention.query),
            expect_linear(attention.key),
            expect_linear(attention.value),
        ),
        attention=SoftmaxAttention(attention, attention.attention_head_size),
        attention_out=expect_linear(attention.dense),
        attention_norm=expect_layer_norm(attention.LayerNorm),
        ffn_in=expect_linear(layer.ffn),
        activation=read_activation(layer.activation),
        ffn_out=expect_linear(layer.ffn_output),
        ffn_norm=expect_layer_norm(layer.full_layer_layer_norm),
    )


FAMILY = Family(
    name="albert",
    module="transformers.models.albert.modeling_albert",
    class_names=("AlbertModel",),
    output_class="BaseModelOutputWithPooling",
    stack=("embeddings", "encoder"),
    read=read,
    facts=facts,
    pool=pool,
    first_token_heads={"AlbertForSequenceClassification": None, "AlbertForMultipleChoice": None},
)
