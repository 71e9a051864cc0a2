"""ModernBERT (Warner et al. 2024, https://arxiv.org/abs/2412.13663): rotary positions, windows of
local attention between layers of global attention, gated feed-forwards, norms ahead of each half.

transformers 4 gives each layer a rotary embedding of its own, transformers 5 one to the model.
"""

from __future__ import annotations

from typing import Any

import torch

from encoder_fast.errors import UnsupportedModelError
from encoder_fast.families import family
from encoder_fast.families.family import (
    Family,
    check_heads,
    expect,
    expect_embedding,
    expect_layer_norm,
    expect_linear,
    last_state_is_normed,
    read_activation,
)
from encoder_fast.spec import EmbeddingSpec, EncoderSpec, LayerSpec, RotarySpec, SoftmaxAttention


def read(model: Any) -> EncoderSpec:
    """Read a ``ModernBertModel``."""
    embeddings = expect(model.embeddings, "ModernBertEmbeddings")
    shared = _has_shared_rotary(model)
    rotaries: list[RotarySpec] = []
    return EncoderSpec(
        embeddings=EmbeddingSpec(
            word=expect_embedding(embeddings.tok_embeddings),
            position=None,
            token_type=None,
            norm=expect_layer_norm(embeddings.norm),
        ),
        layers=tuple(_read_layer(layer, model, rotaries) for layer in model.layers),
        norm_order="pre",
        final_norm=expect_layer_norm(model.final_norm),
        # transformers 4 appends the last of the hidden states before it normalises.
        normed_last_state=shared and last_state_is_normed(model),
    )


def facts(model: Any) -> tuple:
    """Beside those of all families, which layers are local."""
    if _has_shared_rotary(model):
        kinds: list[Any] = [layer.attention_type for layer in model.layers]
    else:
        kinds = [layer.attn.local_attention for layer in model.layers]
    return (*family.facts(model), getattr(model.config, "local_attention", None), *kinds)


def _has_shared_rotary(model: Any) -> bool:
    return "rotary_emb" in model._modules


def _read_layer(layer: Any, model: Any, rotaries: list[RotarySpec]) -> LayerSpec:
    expect(layer, "ModernBertEncoderLayer")
    attention = expect(layer.attn, "ModernBertAttention")
    check_heads(attention, attention.head_dim, expect_linear(attention.Wqkv), projections=3)
    mlp = expect(layer.mlp, "ModernBertMLP")
    # The first layer has none: its input has just been normalised.
    attention_norm = expect(layer.attn_norm, "LayerNorm", "Identity")
    if _has_shared_rotary(model):
        if layer.attention_type not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"layer type {layer.attention_type!r} has no fast path")
        is_local = layer.attention_type == "sliding_attention"
        rotary = _shared_rotary(model.rotary_emb, layer.attention_type)
    else:
        is_local = attention.local_attention != (-1, -1)
        rotary = _own_rotary(attention.rotary_emb, rotaries)
    return LayerSpec(
        projections=(expect_linear(attention.Wqkv),),
        attention=SoftmaxAttention(
            attention,
            attention.head_dim,
            window_size=model.config.local_attention // 2 if is_local else None,
            rotary=rotary,
        ),
        attention_out=expect_linear(attention.Wo),
        attention_norm=(
            None if type(attention_norm) is torch.nn.Identity else expect_layer_norm(attention_norm)
        ),
        ffn_in=expect_linear(mlp.Wi),
        activation=read_activation(mlp.act),
        ffn_out=expect_linear(mlp.Wo),
        ffn_norm=expect_layer_norm(layer.mlp_norm),
        gated=True,
    )


def _shared_rotary(rotary: Any, layer_type: str) -> RotarySpec:
    expect(rotary, "ModernBertRotaryEmbedding")
    _check_rope(rotary.rope_type[layer_type])
    scaling = getattr(rotary, f"{layer_type}_attention_scaling")
    return RotarySpec(rotary, f"{layer_type}_inv_freq", scaling)


def _own_rotary(rotary: Any, known: list[RotarySpec]) -> RotarySpec:
    """The rotary embedding of one layer, or that of an earlier layer with the same angles."""
    if type(rotary).__name__ == "ModernBertUnpaddedRotaryEmbedding":
        raise UnsupportedModelError(
            "transformers 4 takes the padding out of ModernBERT itself under "
            "attn_implementation='flash_attention_2': load it with 'sdpa'"
        )
    expect(rotary, "ModernBertRotaryEmbedding")
    _check_rope(rotary.rope_type)
    scaling = rotary.attention_scaling
    for spec in known:
        if spec.scaling == scaling and torch.equal(spec.module.inv_freq, rotary.inv_freq):
            return spec
    known.append(RotarySpec(rotary, "inv_freq", scaling))
    return known[-1]


def _check_rope(kind: str) -> None:
    if kind != "default":
        raise UnsupportedModelError(f"rope_type={kind!r} has no fast path")


FAMILY = Family(
    name="modernbert",
    module="transformers.models.modernbert.modeling_modernbert",
    class_names=("ModernBertModel",),
    output_class="BaseModelOutput",
    stack=("embeddings", "layers", "final_norm", "rotary_emb"),
    read=read,
    facts=facts,
    first_token_heads={"ModernBertForSequenceClassification": None},
)
