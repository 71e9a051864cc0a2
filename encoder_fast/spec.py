"""What an encoder is, told to the engine: a plain description, read from a live model.

A family (:mod:`encoder_fast.families`) fills an :class:`EncoderSpec`. It names the model's own
modules instead of their tensors, so a weight that is replaced, loaded, moved or cast later is seen
at the next call. No arithmetic happens here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from encoder_fast.ops.linear import Activation


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """``LayerNorm(word[ids] + token_type[types] + position[positions])``, then the projection.

    Attributes:
        position_padding_idx: where set, positions follow RoBERTa's rule: they count a row's ids
            other than this one, from ``position_padding_idx + 1``. Else a token's position is its
            column.
        projection: from the embeddings' width to the layers', or ``None`` where they are the same.
    """

    word: nn.Embedding
    position: nn.Embedding
    token_type: nn.Embedding | None
    norm: nn.LayerNorm
    position_padding_idx: int | None = None
    projection: nn.Linear | None = None

    @property
    def max_positions(self) -> int:
        """The longest sequence that the position table can serve."""
        first = 0 if self.position_padding_idx is None else self.position_padding_idx + 1
        return self.position.weight.shape[0] - first


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One post-norm encoder layer.

    Attributes:
        attention: the module that holds the projections, for what it says of its own scale.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention: nn.Module
    head_size: int
    attention_out: nn.Linear
    attention_norm: nn.LayerNorm
    ffn_in: nn.Linear
    activation: Activation
    ffn_out: nn.Linear
    ffn_norm: nn.LayerNorm

    @property
    def softmax_scale(self) -> float:
        """The attention module's own ``scaling``, where it has one."""
        return self.attention.__dict__.get("scaling", self.head_size**-0.5)


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A whole encoder.

    Attributes:
        embeddings: how tokens become the first hidden state.
        layers: the layers, in order.
    """

    embeddings: EmbeddingSpec
    layers: tuple[LayerSpec, ...]

    @property
    def tables_and_norms(self) -> list[nn.Module]:
        """The modules whose parameters are used as they are, unlike the linears'."""
        embeddings = self.embeddings
        tables = [embeddings.word, embeddings.position, embeddings.norm]
        if embeddings.token_type is not None:
            tables.append(embeddings.token_type)
        norms = [norm for layer in self.layers for norm in (layer.attention_norm, layer.ffn_norm)]
        return [*tables, *norms]

    @property
    def head_sizes(self) -> frozenset[int]:
        return frozenset(layer.head_size for layer in self.layers)
