"""The encoder loop: one for all families.

Runs an :class:`~encoder_fast.spec.EncoderSpec` over a :class:`~encoder_fast.packing.PackedBatch`.
Everything here is ``(total, ...)``: nothing waits for the device, and nothing knows of padding but
what stands in a first column that somebody reads (see :mod:`encoder_fast.onlookers`), or between
tokens whose distance counts (see :mod:`encoder_fast.gaps`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder_fast import gaps
from encoder_fast.onlookers import Onlookers
from encoder_fast.ops import (
    add_layer_norm,
    attention,
    disentangled_attention,
    embed_layer_norm,
    linear,
    rotary,
)
from encoder_fast.ops.linear import PreparedLinear
from encoder_fast.packing import PackedBatch
from encoder_fast.spec import (
    AttentionSpec,
    ConvolutionSpec,
    DisentangledAttention,
    EmbeddingSpec,
    EncoderSpec,
    RelativeBias,
    RotarySpec,
    SoftmaxAttention,
    epsilon,
)
from encoder_fast.weights import EncoderWeights, LayerWeights


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
    position_table = None if spec.position is None else spec.position.weight
    norm = spec.norm
    projects_first = projection is not None and spec.projects_first
    if inputs_embeds is None and norm is not None and not projects_first:
        hidden = embed_layer_norm.operator.run(
            input_ids,
            None if position_table is None else position_ids,
            token_type_ids,
            spec.word.weight,
            position_table,
            type_table,
            norm.weight,
            norm.bias,
            epsilon(norm),
            backend,
        )
    else:
        if inputs_embeds is None:
            assert input_ids is not None
            hidden = F.embedding(input_ids, spec.word.weight)
        else:
            hidden = inputs_embeds
        for ids, table in ((token_type_ids, type_table), (position_ids, position_table)):
            if ids is not None and table is not None:
                hidden = hidden + F.embedding(ids, table)
        if projection is not None and projects_first:
            hidden, projection = linear.run(hidden, projection, None, backend), None
        if norm is not None:
            hidden = _add_norm(norm, hidden, None, backend)
    return hidden if projection is None else linear.run(hidden, projection, None, backend)


@dataclass(frozen=True, slots=True)
class _Forward:
    """What the layers of one forward share; tables are made when a layer first asks for them."""

    backend: str
    batch: PackedBatch
    position_ids: Tensor
    onlookers: Onlookers | None
    row_of_distance: Tensor | None
    _angles: dict[RotarySpec, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _biases: dict[RelativeBias, Tensor] = field(default_factory=dict)

    def angles(self, spec: RotarySpec) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens' rotations."""
        if spec not in self._angles:
            frequencies = getattr(spec.module, spec.buffer)
            cos, sin = rotary.rotary_tables(self.position_ids, frequencies)
            if spec.scaling != 1:
                cos, sin = cos * spec.scaling, sin * spec.scaling
            self._angles[spec] = cos, sin
        return self._angles[spec]

    def bias(self, spec: RelativeBias | None) -> Tensor | None:
        """The bias of each distance, ``(H, 2 · R + 1)``."""
        if spec is None:
            return None
        if spec not in self._biases:
            assert self.row_of_distance is not None
            self._biases[spec] = spec.table.weight.t().index_select(1, self.row_of_distance)
        return self._biases[spec]


def encode(
    spec: EncoderSpec,
    weights: EncoderWeights,
    backend: str,
    batch: PackedBatch,
    position_ids: Tensor,
    hidden: Tensor,
    collect: list[Tensor] | None = None,
    first_token_alone: bool = False,
) -> Tensor:
    """Run the layers.

    Args:
        position_ids: integers ``(total,)``, for the layers that know positions themselves.
        hidden: ``(total, N)``, the embeddings.
        collect: where given, each layer's output is appended to it, as the model returns it.
        first_token_alone: nothing but each row's first token is wanted. The last layer then
            computes keys and values for all tokens, and what follows attention for those alone.

    Returns:
        The last hidden state: ``(total, N)``, or ``(B, N)`` of the first tokens.
    """
    # What goes into the next half of a layer, and what its output is added to. In post-norm order
    # they are the same.
    normed = residual = embeddings = hidden
    if spec.first_norm is not None:
        normed = _add_norm(spec.first_norm, hidden, None, backend)
    forward = _Forward(backend, batch, position_ids, Onlookers.of(batch), weights.row_of_distance)
    keeps_sum = spec.norm_order == "pre"
    last = len(spec.layers) - 1
    # A convolution behind the only layer reads all tokens.
    leaves_out = first_token_alone and (last > 0 or spec.convolution is None)
    stages = zip(spec.layers, weights.layers, spec.norms, strict=True)
    for index, (layer, prepared, (norm_after_attention, norm_after_ffn)) in enumerate(stages):
        context = _attend(layer.attention, prepared, forward, normed)
        if index == last and leaves_out:
            context, residual = batch.first_tokens(context), batch.first_tokens(residual)
        attended = linear.run(context, prepared.attention_out, None, backend)
        normed, residual = _join(norm_after_attention, attended, residual, keeps_sum, backend)
        transformed = linear.run_feed_forward(
            normed, prepared.feed_forward, layer.activation, backend
        )
        if index == last and collect is None:
            keeps_sum = False
        normed, residual = _join(norm_after_ffn, transformed, residual, keeps_sum, backend)
        if index == 0 and spec.convolution is not None:
            assert weights.convolution is not None
            normed = residual = _convolve(
                spec.convolution, weights.convolution, backend, batch, embeddings, normed
            )
        if collect is not None:
            collect.append(normed if index == last and spec.normed_last_state else residual)
    if first_token_alone:
        return batch.blank_empty_rows(normed if leaves_out else batch.first_tokens(normed))
    return normed


def _attend(
    spec: AttentionSpec, prepared: LayerWeights, forward: _Forward, hidden: Tensor
) -> Tensor:
    """The context of each token, ``(total, H · D)``, by the layer's kind of attention."""
    qkv = linear.run(hidden, prepared.qkv, None, forward.backend)
    # Read off the weights, not the config: a layer may have been pruned of heads.
    num_heads = qkv.shape[1] // (3 * spec.head_size)
    if isinstance(spec, DisentangledAttention):
        context = _attend_disentangled(spec, prepared, forward, qkv, num_heads)
    else:
        context = _attend_softmax(spec, forward, qkv.view(-1, 3, num_heads, spec.head_size))
    return context.flatten(1)


def _attend_softmax(spec: SoftmaxAttention, forward: _Forward, qkv: Tensor) -> Tensor:
    batch, backend = forward.batch, forward.backend
    if spec.rotary is not None:
        rotary.operator.run(qkv, *forward.angles(spec.rotary), backend)
    q, k, v = qkv.unbind(1)
    bias = forward.bias(spec.relative_bias)
    if batch.has_gaps and spec.sees_gaps(batch.padded_length):
        return gaps.attend(q, k, v, batch, spec.softmax_scale, spec.window_size, bias)
    context = attention.operator.run(
        q,
        k,
        v,
        batch.cu_seqlens,
        batch.max_seqlen,
        spec.softmax_scale,
        spec.window_size,
        bias,
        backend,
    )
    if forward.onlookers is not None:
        forward.onlookers.attend(q, k, v, spec.softmax_scale, context)
    return context


def _attend_disentangled(
    spec: DisentangledAttention,
    prepared: LayerWeights,
    forward: _Forward,
    qkv: Tensor,
    num_heads: int,
) -> Tensor:
    batch, backend = forward.batch, forward.backend
    if spec.by_head:
        q, k, v = qkv.view(-1, num_heads, 3, spec.head_size).unbind(2)
    else:
        q, k, v = qkv.view(-1, 3, num_heads, spec.head_size).unbind(1)
    cu_seqlens, max_seqlen, scale = batch.cu_seqlens, batch.max_seqlen, spec.softmax_scale
    pos_key, pos_query = prepared.pos_key, prepared.pos_query
    if pos_key is None and pos_query is None:
        return attention.operator.run(q, k, v, cu_seqlens, max_seqlen, scale, None, None, backend)
    rows = forward.row_of_distance
    assert rows is not None
    if batch.has_gaps:
        return gaps.attend_disentangled(q, k, v, pos_key, pos_query, rows, batch, scale)
    return disentangled_attention.operator.run(
        q, k, v, pos_key, pos_query, rows, cu_seqlens, max_seqlen, scale, backend
    )


def _convolve(
    spec: ConvolutionSpec,
    prepared: PreparedLinear,
    backend: str,
    batch: PackedBatch,
    embeddings: Tensor,
    hidden: Tensor,
) -> Tensor:
    """The convolution along each sequence as one GEMM over the windows of its tokens."""
    windows = batch.windows(embeddings, spec.conv.kernel_size[0])
    convolved = linear.run(windows.flatten(1), prepared, spec.activation, backend)
    return _add_norm(spec.norm, convolved, hidden, backend)


def _join(
    norm: nn.LayerNorm | None, x: Tensor, residual: Tensor, keeps_sum: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """``x + residual`` normalised, and what the next half's output is added to: with
    ``keeps_sum`` the sum itself, else the same again."""
    if norm is None:
        total = x + residual
        return total, total
    if keeps_sum:
        return add_layer_norm.sum_operator.run(
            x, residual, norm.weight, norm.bias, epsilon(norm), None, backend
        )
    normed = _add_norm(norm, x, residual, backend)
    return normed, normed


def _add_norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor | None, backend: str) -> Tensor:
    return add_layer_norm.operator.run(
        x, residual, norm.weight, norm.bias, epsilon(norm), None, backend
    )
