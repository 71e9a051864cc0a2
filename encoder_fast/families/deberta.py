"""DeBERTa v1 (He et al. 2020, https://arxiv.org/abs/2006.03654): relative positions up to a limit,
one projection for queries, keys and values, head by head."""

from __future__ import annotations

from typing import Any

from torch import nn

from encoder_fast.errors import UnsupportedModelError
from encoder_fast.families.deberta_layout import (
    check_model,
    expect_library_methods,
    read_embeddings,
    read_layer,
    read_positions,
)
from encoder_fast.families.family import Family, check_heads, expect, expect_linear
from encoder_fast.spec import DisentangledAttention, EncoderSpec, LayerSpec, RelativePositions


def read(model: Any) -> EncoderSpec:
    """Read a ``DebertaModel``."""
    check_model(model)
    encoder: Any = expect(model.encoder, "DebertaEncoder")
    expect_library_methods(encoder, "get_rel_embedding", "get_rel_pos", "get_attention_mask")
    positions = None
    if encoder.relative_attention:
        positions = read_positions(encoder, 0, encoder.max_relative_positions, None)
    return EncoderSpec(
        embeddings=read_embeddings(model.embeddings, "Deberta"),
        layers=tuple(_read_layer(layer, positions) for layer in encoder.layer),
    )


def _read_layer(layer: Any, positions: RelativePositions | None) -> LayerSpec:
    attention: Any = expect(layer.attention.self, "DisentangledSelfAttention")
    expect_library_methods(attention, "disentangled_att_bias", "transpose_for_scores")
    if attention.head_logits_proj is not None or attention.head_weights_proj is not None:
        raise UnsupportedModelError("talking_head=True has no fast path")
    in_proj: Any = expect_linear(attention.in_proj)
    if in_proj.bias is not None:
        raise UnsupportedModelError("an in_proj with a bias beside q_bias and v_bias")
    head_size = attention.attention_head_size
    check_heads(attention, head_size, in_proj, projections=3)
    if attention.relative_attention != (positions is not None):
        raise UnsupportedModelError("layers that differ in relative_attention")
    kinds = attention.pos_att_type
    pos_key: nn.Linear | None = None
    pos_query: nn.Linear | None = None
    if positions is not None:
        if attention.max_relative_positions != positions.span:
            raise UnsupportedModelError("layers that differ in max_relative_positions")
        pos_key = expect_linear(attention.pos_proj) if "c2p" in kinds else None
        pos_query = expect_linear(attention.pos_q_proj) if "p2c" in kinds else None
    spec = DisentangledAttention(
        module=attention,
        head_size=head_size,
        # By the number of types that the config lists, whether they are computed or not.
        softmax_scale=(head_size * (1 + len(kinds))) ** -0.5,
        positions=positions,
        pos_key=pos_key,
        pos_query=pos_query,
        by_head=True,
    )
    return read_layer(layer, "Deberta", (in_proj,), spec)


FAMILY = Family(
    name="deberta",
    module="transformers.models.deberta.modeling_deberta",
    class_names=("DebertaModel",),
    output_class="BaseModelOutput",
    stack=("embeddings", "encoder"),
    read=read,
    first_token_heads={"DebertaForSequenceClassification": "ContextPooler"},
)
