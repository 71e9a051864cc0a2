"""DeBERTa v2 and v3 (He et al. 2021, https://arxiv.org/abs/2111.09543): relative positions in
logarithmic buckets, projections shared between content and position, a convolution in the largest.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from encoder_fast.errors import UnsupportedModelError
from encoder_fast.families import family
from encoder_fast.families.deberta_layout import (
    check_model,
    expect_library_methods,
    expect_norm,
    read_embeddings,
    read_layer,
    read_positions,
)
from encoder_fast.families.family import (
    Family,
    check_heads,
    expect,
    expect_linear,
    read_activation,
)
from encoder_fast.spec import (
    ConvolutionSpec,
    DisentangledAttention,
    EncoderSpec,
    LayerSpec,
    RelativePositions,
)


def read(model: Any) -> EncoderSpec:
    """Read a ``DebertaV2Model``."""
    check_model(model)
    encoder: Any = expect(model.encoder, "DebertaV2Encoder")
    expect_library_methods(encoder, "get_rel_embedding", "get_rel_pos", "get_attention_mask")
    positions = _read_positions(encoder) if encoder.relative_attention else None
    return EncoderSpec(
        embeddings=read_embeddings(model.embeddings, "DebertaV2"),
        layers=tuple(_read_layer(layer, positions) for layer in encoder.layer),
        convolution=None if encoder.conv is None else _read_convolution(encoder.conv),
    )


def facts(model: Any) -> tuple:
    """Beside those of all families, the activation that a convolution finds by name."""
    from transformers.activations import ACT2FN

    conv = getattr(model.encoder, "conv", None)
    return (*family.facts(model), None if conv is None else dict.get(ACT2FN, conv.conv_act))


def _read_positions(encoder: Any) -> RelativePositions:
    limit, buckets = encoder.max_relative_positions, max(encoder.position_buckets, 0)
    if buckets and not 1 <= buckets // 2 < limit - 1:
        raise UnsupportedModelError(
            f"position_buckets={buckets} leaves no logarithmic steps up to "
            f"max_relative_positions={limit}"
        )
    norm = expect_norm(encoder.LayerNorm) if "layer_norm" in encoder.norm_rel_ebd else None
    return read_positions(encoder, buckets, buckets or limit, norm)


def _read_layer(layer: Any, positions: RelativePositions | None) -> LayerSpec:
    attention: Any = expect(layer.attention.self, "DisentangledSelfAttention")
    expect_library_methods(attention, "disentangled_attention_bias", "transpose_for_scores")
    query, key, value = (
        expect_linear(module)
        for module in (attention.query_proj, attention.key_proj, attention.value_proj)
    )
    head_size = attention.attention_head_size
    check_heads(attention, head_size, query)
    if attention.relative_attention != (positions is not None):
        raise UnsupportedModelError("layers that differ in relative_attention")
    has_key, has_query = ("c2p" in attention.pos_att_type, "p2c" in attention.pos_att_type)
    pos_key: nn.Linear | None = None
    pos_query: nn.Linear | None = None
    if positions is not None:
        own = (attention.pos_ebd_size, attention.max_relative_positions)
        buckets = max(attention.position_buckets, 0)
        if (*own, buckets) != (positions.span, positions.max_distance, positions.buckets):
            raise UnsupportedModelError("layers that differ in their relative positions")
        shares = attention.share_att_key
        if has_key:
            pos_key = key if shares else expect_linear(attention.pos_key_proj)
        if has_query:
            pos_query = query if shares else expect_linear(attention.pos_query_proj)
    spec = DisentangledAttention(
        module=attention,
        head_size=head_size,
        # Without relative attention too, a type that the config lists counts.
        softmax_scale=(head_size * (1 + has_key + has_query)) ** -0.5,
        positions=positions,
        pos_key=pos_key,
        pos_query=pos_query,
    )
    return read_layer(layer, "DebertaV2", (query, key, value), spec)


def _read_convolution(layer: Any) -> ConvolutionSpec:
    from transformers.activations import ACT2FN

    expect(layer, "ConvLayer")
    conv: Any = expect(layer.conv, "Conv1d")
    (size,) = conv.kernel_size
    if conv.groups != 1:
        raise UnsupportedModelError(f"conv_groups={conv.groups} has no fast path")
    usual = ((size // 2,), (1,), (1,), "zeros")
    if size % 2 == 0 or (conv.padding, conv.stride, conv.dilation, conv.padding_mode) != usual:
        raise UnsupportedModelError(f"a convolution that is not centred, {conv}")
    activation = read_activation(ACT2FN[layer.conv_act])
    return ConvolutionSpec(conv, activation, expect_norm(layer.LayerNorm))


FAMILY = Family(
    name="deberta_v2",
    module="transformers.models.deberta_v2.modeling_deberta_v2",
    class_names=("DebertaV2Model",),
    output_class="BaseModelOutput",
    stack=("embeddings", "encoder"),
    read=read,
    facts=facts,
    first_token_heads={
        "DebertaV2ForSequenceClassification": "ContextPooler",
        "DebertaV2ForMultipleChoice": "ContextPooler",
    },
)
