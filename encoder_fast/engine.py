"""The encoder loop: one for all families.

Runs an :class:`~encoder_fast.spec.EncoderSpec` over a :class:`~encoder_fast.packing.PackedBatch`.
Everything here is ``(total, ...)``: nothing knows of padding, and nothing waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder_fast.ops import add_layer_norm, attention, embed_layer_norm, linear
from encoder_fast.ops.linear import PreparedLinear
from encoder_fast.packing import PackedBatch
from encoder_fast.spec import EmbeddingSpec, EncoderSpec
from encoder_fast.weights import EncoderWeights


def embed(
    spec: EmbeddingSpec,
    projection: PreparedLinear | None,
    backend: str,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> Tensor:
    """The first hidden state, ``(total, N)``.

    Args:
        projection: the prepared ``spec.projection``.
        position_ids, token_type_ids, input_ids: integers ``(total,)``; no token types means zeros.
        inputs_embeds: ``(total, E)`` in place of the word embeddings of ``input_ids``.
    """
    type_table = None if spec.token_type is None else spec.token_type.weight
    if type_table is None:
        token_type_ids = None
    elif token_type_ids is None:
        token_type_ids = torch.zeros_like(position_ids)
    norm = spec.norm
    if inputs_embeds is None:
        hidden = embed_layer_norm.operator.run(
            input_ids,
            position_ids,
            token_type_ids,
            spec.word.weight,
            spec.position.weight,
            type_table,
            norm.weight,
            norm.bias,
            norm.eps,
            backend,
        )
    else:
        if type_table is not None and token_type_ids is not None:
            inputs_embeds = inputs_embeds + F.embedding(token_type_ids, type_table)
        positions = F.embedding(position_ids, spec.position.weight)
        hidden = _add_norm(norm, inputs_embeds, positions, backend)
    return hidden if projection is None else linear.run(hidden, projection, None, backend)


def encode(
    spec: EncoderSpec,
    weights: EncoderWeights,
    backend: str,
    batch: PackedBatch,
    hidden: Tensor,
    collect: list[Tensor] | None = None,
) -> Tensor:
    """Run the layers.

    Args:
        hidden: ``(total, N)``, the embeddings.
        collect: where given, each layer's output is appended to it.

    Returns:
        ``(total, N)``, the last hidden state.
    """
    for layer, prepared in zip(spec.layers, weights.layers, strict=True):
        qkv = linear.run(hidden, prepared.qkv, None, backend)
        # Read off the weights, not the config: a layer may have been pruned of heads.
        num_heads = qkv.shape[1] // (3 * layer.head_size)
        q, k, v = qkv.view(batch.total, 3, num_heads, layer.head_size).unbind(1)
        context = attention.operator.run(
            q, k, v, batch.cu_seqlens, batch.max_seqlen, layer.softmax_scale, backend
        )
        attended = linear.run(context.flatten(1), prepared.attention_out, None, backend)
        hidden = _add_norm(layer.attention_norm, attended, hidden, backend)
        transformed = linear.run_feed_forward(
            hidden, prepared.feed_forward, layer.activation, backend
        )
        hidden = _add_norm(layer.ffn_norm, transformed, hidden, backend)
        if collect is not None:
            collect.append(hidden)
    return hidden


def _add_norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor, backend: str) -> Tensor:
    return add_layer_norm.operator.run(x, residual, norm.weight, norm.bias, norm.eps, None, backend)
