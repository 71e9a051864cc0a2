"""MPNet (Song et al. 2020, https://arxiv.org/abs/2004.09297): all-mpnet-base-v2 and its like.

BERT's layers without token types, positions as in RoBERTa, and T5's relative position bias: one
table of 32 buckets of distances, shared by all layers.
"""

from __future__ import annotations

import functools
from typing import Any

from encoder_fast.errors import UnsupportedModelError
from encoder_fast.families.bert_layout import check_pooler
from encoder_fast.families.family import (
    Family,
    check_heads,
    expect,
    expect_embedding,
    expect_layer_norm,
    expect_linear,
    read_activation,
)
from encoder_fast.families.origin import is_library_code
from encoder_fast.spec import (
    EmbeddingSpec,
    EncoderSpec,
    LayerSpec,
    RelativeBias,
    SoftmaxAttention,
)

# From this distance on every one falls into the last bucket of its side.
_REACH = 128

# The encoder asks its own method for so many, whatever the config says.
_BUCKETS = 32


def read(model: Any) -> EncoderSpec:
    """Read an ``MPNetModel``."""
    check_pooler(model, "MPNetPooler")
    embeddings = expect(model.embeddings, "MPNetEmbeddings")
    encoder = expect(model.encoder, "MPNetEncoder")
    bias = _read_bias(encoder)
    return EncoderSpec(
        embeddings=EmbeddingSpec(
            word=expect_embedding(embeddings.word_embeddings),
            position=expect_embedding(embeddings.position_embeddings),
            token_type=None,
            norm=expect_layer_norm(embeddings.LayerNorm),
            position_padding_idx=embeddings.padding_idx,
        ),
        layers=tuple(_read_layer(layer, bias) for layer in encoder.layer),
    )


def _read_bias(encoder: Any) -> RelativeBias:
    for name in ("compute_position_bias", "relative_position_bucket"):
        if not is_library_code(getattr(encoder, name)) or name in encoder.__dict__:
            raise UnsupportedModelError(f"the encoder's {name} was replaced")
    table = expect_embedding(encoder.relative_attention_bias)
    if table.weight.shape[0] < _BUCKETS:
        raise UnsupportedModelError(
            f"relative_attention_num_buckets={table.weight.shape[0]}, and the encoder reads "
            f"{_BUCKETS}"
        )
    bucket_of = functools.partial(encoder.relative_position_bucket, num_buckets=_BUCKETS)
    return RelativeBias(table, _REACH, bucket_of)


def _read_layer(layer: Any, bias: RelativeBias) -> LayerSpec:
    expect(layer, "MPNetLayer")
    outer = expect(layer.attention, "MPNetAttention")
    attention = expect(outer.attn, "MPNetSelfAttention")
    check_heads(attention, attention.attention_head_size, expect_linear(attention.q))
    ffn_in = expect(layer.intermediate, "MPNetIntermediate")
    ffn_out = expect(layer.output, "MPNetOutput")
    if attention.num_attention_heads != bias.table.weight.shape[1]:
        raise UnsupportedModelError(
            f"{attention.num_attention_heads} attention heads, and a relative position bias for "
            f"{bias.table.weight.shape[1]}"
        )
    return LayerSpec(
        projections=(
            expect_linear(attention.q),
            expect_linear(attention.k),
            expect_linear(attention.v),
        ),
        attention=SoftmaxAttention(attention, attention.attention_head_size, relative_bias=bias),
        attention_out=expect_linear(attention.o),
        attention_norm=expect_layer_norm(outer.LayerNorm),
        ffn_in=expect_linear(ffn_in.dense),
        activation=read_activation(ffn_in.intermediate_act_fn),
        ffn_out=expect_linear(ffn_out.dense),
        ffn_norm=expect_layer_norm(ffn_out.LayerNorm),
    )


FAMILY = Family(
    name="mpnet",
    module="transformers.models.mpnet.modeling_mpnet",
    class_names=("MPNetModel",),
    output_class="BaseModelOutputWithPooling",
    stack=("embeddings", "encoder"),
    read=read,
    first_token_heads={
        "MPNetForSequenceClassification": "MPNetClassificationHead",
        "MPNetForMultipleChoice": None,
    },
)
