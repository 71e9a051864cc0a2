"""What DeBERTa v1 and v2 share: embeddings, the order of a layer, the checks on a whole model."""

from __future__ import annotations

from typing import Any

from torch import nn

from encoder_fast.errors import UnsupportedModelError
from encoder_fast.families.family import (
    expect,
    expect_default_ids,
    expect_embedding,
    expect_layer_norm,
    expect_linear,
    read_activation,
)
from encoder_fast.families.origin import is_library_code
from encoder_fast.spec import DisentangledAttention, EmbeddingSpec, LayerSpec, RelativePositions


def check_model(model: Any) -> None:
    """Refuse what would run layers that the encoder does not."""
    if model.z_steps > 1:
        raise UnsupportedModelError(f"z_steps={model.z_steps} has no fast path")


def read_embeddings(embeddings: Any, prefix: str) -> EmbeddingSpec:
    """The ``<prefix>Embeddings``; the original's product with the mask is the packing itself."""
    expect(embeddings, f"{prefix}Embeddings")
    expect_default_ids(embeddings)
    positions = embeddings.position_embeddings if embeddings.position_biased_input else None
    types, projection = embeddings.token_type_embeddings, embeddings.embed_proj
    return EmbeddingSpec(
        word=expect_embedding(embeddings.word_embeddings),
        position=None if positions is None else expect_embedding(positions),
        token_type=None if types is None else expect_embedding(types),
        norm=expect_norm(embeddings.LayerNorm),
        projection=None if projection is None else expect_linear(projection),
        projects_first=True,
    )


def read_positions(
    encoder: Any, buckets: int, span: int, norm: nn.LayerNorm | None
) -> RelativePositions:
    """The position embeddings of an encoder with relative attention."""
    table = expect_embedding(encoder.rel_embeddings)
    if table.weight.shape[0] < 2 * span:
        raise UnsupportedModelError(
            f"{table.weight.shape[0]} relative position embeddings, {2 * span} are needed"
        )
    return RelativePositions(table, norm, span, buckets, encoder.max_relative_positions)


def read_layer(
    layer: Any, prefix: str, projections: tuple[nn.Linear, ...], attention: DisentangledAttention
) -> LayerSpec:
    """The rest of a ``<prefix>Layer`` around its attention."""
    expect(layer, f"{prefix}Layer")
    expect(layer.attention, f"{prefix}Attention")
    attention_out = expect(layer.attention.output, f"{prefix}SelfOutput")
    ffn_in = expect(layer.intermediate, f"{prefix}Intermediate")
    ffn_out = expect(layer.output, f"{prefix}Output")
    return LayerSpec(
        projections=projections,
        attention=attention,
        attention_out=expect_linear(attention_out.dense),
        attention_norm=expect_norm(attention_out.LayerNorm),
        ffn_in=expect_linear(ffn_in.dense),
        activation=read_activation(ffn_in.intermediate_act_fn),
        ffn_out=expect_linear(ffn_out.dense),
        ffn_norm=expect_norm(ffn_out.LayerNorm),
    )


def expect_norm(module: Any) -> nn.LayerNorm:
    """A LayerNorm over one dimension; v1 has a class of its own with the same arithmetic."""
    expect(module, "LayerNorm", "DebertaLayerNorm")
    if module.weight.dim() != 1:
        raise UnsupportedModelError(f"a LayerNorm over {tuple(module.weight.shape)}")
    if isinstance(module, nn.LayerNorm):
        expect_layer_norm(module)
    return module


def expect_library_methods(module: Any, *names: str) -> None:
    """Refuse methods of a module, beside its forward, that were replaced."""
    for name in names:
        if not is_library_code(getattr(type(module), name)) or name in module.__dict__:
            raise UnsupportedModelError(f"{name} of {type(module).__name__} was replaced")
