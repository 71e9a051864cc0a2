"""What an encoder is, told to the engine: a plain description, read from a live model.

A family (:mod:`encoder_fast.families`) fills an :class:`EncoderSpec`. It names the model's own
modules instead of their tensors, so a weight that is replaced, loaded, moved or cast later is seen
at the next call. No arithmetic happens here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from encoder_fast.ops.linear import Activation


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """``LayerNorm(word[ids] + token_type[types] + position[positions])``, then the projection.

    Attributes:
        position, token_type, norm: ``None`` where the model has none.
        position_padding_idx: where set, positions follow RoBERTa's rule: they count a row's ids
            other than this one, from ``position_padding_idx + 1``. Else a token's position is its
            column.
        projection: from the embeddings' width to the layers', or ``None`` where they are the same.
        projects_first: the projection comes before the norm and not after it.
    """

    word: nn.Embedding
    position: nn.Embedding | None
    token_type: nn.Embedding | None
    norm: nn.LayerNorm | None
    position_padding_idx: int | None = None
    projection: nn.Linear | None = None
    projects_first: bool = False

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the position table can serve; ``None`` without a table."""
        if self.position is None:
            return None
        first = 0 if self.position_padding_idx is None else self.position_padding_idx + 1
        return self.position.weight.shape[0] - first


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """Positions as rotations of queries and keys.

    Attributes:
        module, buffer: the buffer of this module holds the inverse frequencies, ``(D / 2,)``.
        scaling: cosines and sines are multiplied by it.
    """

    module: nn.Module
    buffer: str
    scaling: float = 1.0


# Compared by identity: layers that share one share its values.
@dataclass(frozen=True, slots=True, eq=False)
class RelativeBias:
    """A bias on the scores by the distance from query to key.

    Attributes:
        table: ``(buckets, H)``, the bias of each bucket of distances.
        reach: farther distances are in the bucket of this one, on either side.
        bucket_of: the buckets of a tensor of distances, by the model's own function.
    """

    table: nn.Embedding
    reach: int
    bucket_of: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SoftmaxAttention:
    """``softmax(q kᵀ · scale + bias) v`` over the keys of a sequence.

    Attributes:
        module: the module that holds the projections, for what it says of its own scale.
        head_size: ``D``.
        window_size: where set, a token attends to the keys at most so far from it, either way.
        rotary: where set, queries and keys are turned first. Layers that share one of these share
            its angles.
        relative_bias: where set, what is added to the scaled scores.
    """

    module: nn.Module
    head_size: int
    window_size: int | None = None
    rotary: RotarySpec | None = None
    relative_bias: RelativeBias | None = None

    @property
    def softmax_scale(self) -> float:
        """The attention module's own ``scaling``, where it has one."""
        return self.module.__dict__.get("scaling", self.head_size**-0.5)

    def sees_gaps(self, length: int) -> bool:
        """Whether, in rows of ``length`` columns, padding between two tokens changes what they see.

        Packed, tokens on both sides of a hole in the mask are neighbours.
        """
        if self.relative_bias is not None:
            return True
        return self.window_size is not None and length > self.window_size + 1


@dataclass(frozen=True, slots=True)
class RelativePositions:
    """The embeddings of DeBERTa's relative positions, one table for all layers.

    Attributes:
        table: ``(2 * span, N)`` or more; the row of distance 0 is ``span``.
        norm: normalises the table before a layer projects it.
        buckets, max_distance: how distances share rows, as ``make_row_of_distance`` takes them.
    """

    table: nn.Embedding
    norm: nn.LayerNorm | None
    span: int
    buckets: int
    max_distance: int


@dataclass(frozen=True, slots=True)
class DisentangledAttention:
    """Attention whose scores are the sum of content with content, with position, or both ways.

    Attributes:
        module: the module that holds the projections.
        head_size: ``D``.
        softmax_scale: of all terms alike.
        positions: what the tables of the position terms are projected from.
        pos_key, pos_query: the projections; ``None`` for a term that is left out.
        by_head: the one projection of Q, K and V gives the three of each head side by side, and
            their biases are the module's ``q_bias`` and ``v_bias``.
    """

    module: nn.Module
    head_size: int
    softmax_scale: float
    positions: RelativePositions | None
    pos_key: nn.Linear | None
    pos_query: nn.Linear | None
    by_head: bool = False

    def sees_gaps(self, length: int) -> bool:
        """Whether padding between two tokens of a row changes what they see: their distance."""
        return self.pos_key is not None or self.pos_query is not None


# One kind of attention for each way to compute it; the engine chooses by type.
AttentionSpec = SoftmaxAttention | DisentangledAttention


@dataclass(frozen=True, slots=True)
class ConvolutionSpec:
    """``LayerNorm(hidden + activation(conv(embeddings)))`` along each sequence, zeros beyond it."""

    conv: nn.Conv1d
    activation: Activation
    norm: nn.LayerNorm


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One encoder layer: attention and a feed-forward block.

    Attributes:
        projections: the linears that give Q, K and V: three of them, or one for all.
        attention_norm, ffn_norm: after the half they are named for, or before it (see
            :class:`EncoderSpec`); ``None`` where the model has none.
        gated: ``ffn_in`` gives the inner features and then a gate for each:
            ``ffn_out(activation(features) * gate)``.
    """

    projections: tuple[nn.Linear, ...]
    attention: AttentionSpec
    attention_out: nn.Linear
    attention_norm: nn.LayerNorm | None
    ffn_in: nn.Linear
    activation: Activation
    ffn_out: nn.Linear
    ffn_norm: nn.LayerNorm | None
    gated: bool = False


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A whole encoder.

    Attributes:
        embeddings: how tokens become the first hidden state.
        layers: the layers, in order; there is at least one.
        norm_order: ``"post"``: each half of a layer is added to what went into it, and the sum is
            normalised. ``"pre"``: each half runs on a normalised copy of the sum so far.
        final_norm: in pre-norm order, the norm after the last layer.
        normed_last_state: whether the last of the hidden states is what ``final_norm`` gives, or
            what it gets.
        convolution: in post-norm order, what the first layer's output goes through.
    """

    embeddings: EmbeddingSpec
    layers: tuple[LayerSpec, ...]
    norm_order: Literal["post", "pre"] = "post"
    final_norm: nn.LayerNorm | None = None
    normed_last_state: bool = True
    convolution: ConvolutionSpec | None = None

    @property
    def first_norm(self) -> nn.LayerNorm | None:
        """The norm between the embeddings and the first layer's attention."""
        return self.layers[0].attention_norm if self.norm_order == "pre" else None

    @property
    def norms(self) -> list[tuple[nn.LayerNorm | None, nn.LayerNorm | None]]:
        """For each layer, the norm of the sum after its attention and of that after its
        feed-forward, whichever module holds it."""
        if self.norm_order == "post":
            return [(layer.attention_norm, layer.ffn_norm) for layer in self.layers]
        following = [*(layer.attention_norm for layer in self.layers[1:]), self.final_norm]
        return [(layer.ffn_norm, norm) for layer, norm in zip(self.layers, following, strict=True)]

    @property
    def tables_and_norms(self) -> list[nn.Module]:
        """The modules whose parameters are used as they are, unlike the linears'."""
        embeddings = self.embeddings
        modules: list[nn.Module | None] = [
            embeddings.word,
            embeddings.position,
            embeddings.token_type,
            embeddings.norm,
            self.final_norm,
            None if self.convolution is None else self.convolution.norm,
        ]
        for layer in self.layers:
            modules += (layer.attention_norm, layer.ffn_norm)
            if isinstance(layer.attention, SoftmaxAttention) and layer.attention.relative_bias:
                modules.append(layer.attention.relative_bias.table)
        return [module for module in modules if module is not None]

    @property
    def head_sizes(self) -> frozenset[int]:
        return frozenset(layer.attention.head_size for layer in self.layers)

    @property
    def needs(self) -> frozenset[str]:
        """The kinds and options of attention that not every backend has."""
        needs = set()
        for layer in self.layers:
            attention = layer.attention
            if isinstance(attention, DisentangledAttention):
                if attention.pos_key is not None or attention.pos_query is not None:
                    needs.add("disentangled_attention")
                continue
            for name in ("rotary", "window_size", "relative_bias"):
                if getattr(attention, name) is not None:
                    needs.add(name)
        return frozenset(needs)

    @property
    def relative_bias(self) -> RelativeBias | None:
        """The bias by distance that the layers share, where they have one."""
        for layer in self.layers:
            if isinstance(layer.attention, SoftmaxAttention):
                return layer.attention.relative_bias
        return None

    @property
    def positions(self) -> RelativePositions | None:
        """The relative positions that the layers share, where they go by them."""
        for layer in self.layers:
            if isinstance(layer.attention, DisentangledAttention):
                return layer.attention.positions
        return None

    def sees_gaps(self, length: int) -> bool:
        """Whether padding between two tokens of a row changes what any layer computes for them.

        Packed, tokens on both sides of a hole in the mask are neighbours.
        """
        return self.convolution is not None or any(
            layer.attention.sees_gaps(length) for layer in self.layers
        )

    def has_onlookers(self, length: int) -> bool:
        """Whether padding in a first column of ``length`` attends to all tokens of its row, as
        :mod:`encoder_fast.onlookers` computes it."""
        # Disentangled attention hides the text from padding, whether it goes by distance or not.
        return not self.sees_gaps(length) and all(
            isinstance(layer.attention, SoftmaxAttention) for layer in self.layers
        )


def epsilon(norm: nn.Module) -> float:
    """What a LayerNorm adds to the variance; DeBERTa v1's own class has its own name for it."""
    attributes = norm.__dict__
    return attributes["eps"] if "eps" in attributes else attributes["variance_epsilon"]
