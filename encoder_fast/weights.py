"""The weights of a model's linears in the form a backend wants, kept true to the model.

Q, K and V become one GEMM, and on the CPU every weight is reordered for oneDNN. Both are copies, so
each forward first asks whether they still tell the truth, whatever happened to the model since:
``load_state_dict``, ``.to()``, ``.half()``, an edit in place, a new ``Parameter``.

*On the backend* ``cpu`` the copies stand as long as their sources are the same tensors at the same
version and show the same bytes. The version counter sees every edit that autograd sees; an edit
through ``.data`` or a NumPy alias it does not see, so the bytes are looked at: a sample of each
tensor in every call, which catches an edit of a whole tensor, and all of them each time that
another ``FULL_LOOK_TOKENS`` tokens have run, so that no change stays unseen for longer.

*Elsewhere*, where a look would mean to wait for the GPU, the stacked Q, K and V weights are written
anew in every forward: one or two launches that move 6·N² elements a layer, by computation 30 µs in
BERT-base on an H100. The other linears use the live tensors. All this is laid out once and stands
as long as the sources lie in the same places: to lay it out in every forward took the host about as
long as to launch half of BERT-base.

DeBERTa's tables of projected positions are derived from weights alone too, as are v1's biases and
the weights of v2's convolution. The backend ``cpu`` keeps them by the same rule. Elsewhere no rule
tells a changed weight without a wait, so they are derived anew in every forward, the tables of all
layers in one GEMM: in DeBERTa-base 14 GFLOP, and 4·N² elements a layer moved to lie side by side,
by computation 40 µs, against 170 µs for a small GEMM a layer and table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from encoder_fast.errors import NotFastError
from encoder_fast.fingerprints import Samples, checksum_of_all
from encoder_fast.ops import linear
from encoder_fast.ops.linear import PreparedFeedForward, PreparedLinear
from encoder_fast.position_tables import project_positions
from encoder_fast.spec import DisentangledAttention, EncoderSpec, LayerSpec

# A look at all of MiniLM's bytes takes as long as 30 of its tokens: 3% of the time for every 1,024,
# 12% for every 256.
FULL_LOOK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The linears of one layer, prepared, and its tables of positions ``(rows, H, D)``."""

    qkv: PreparedLinear
    attention_out: PreparedLinear
    feed_forward: PreparedFeedForward
    pos_key: Tensor | None = None
    pos_query: Tensor | None = None


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """The linears of an encoder, prepared: the projection of its embeddings, its convolution over
    windows of tokens, and each layer's."""

    projection: PreparedLinear | None
    convolution: PreparedLinear | None
    layers: list[LayerWeights]


@dataclass(frozen=True, slots=True)
class _Copied:
    """All layers' weights as copies, and what they were made from.

    ``samples`` hold views of the sources: they keep the memory alive, so that no new tensor can
    come to lie at an old address.
    """

    identity: list[tuple | None]
    samples: Samples
    checksum: int
    weights: EncoderWeights


@dataclass(frozen=True, slots=True)
class _Live:
    """All layers' weights as views of the sources, and the parts of stacks to rewrite from them.

    ``sources`` keep the memory alive, as :class:`_Copied` has it.
    """

    places: tuple
    sources: list[Tensor]
    stacked: list[Tensor]
    stacked_from: list[Tensor]
    weights: EncoderWeights


class WeightCache:
    """The prepared weights of one encoder on one backend. Safe to share between threads."""

    def __init__(self, spec: EncoderSpec, backend: str) -> None:
        self._backend = backend
        self._projection = spec.embeddings.projection
        self._layers = spec.layers
        # ALBERT runs one layer many times: its weights are prepared once.
        self._distinct = list({id(layer): layer for layer in spec.layers}.values())
        self._positions = spec.positions
        self._convolution = spec.convolution
        self._sources = [(module, name) for module, names in self._modules() for name in names]
        self._unprepared = spec.tables_and_norms
        # Replaced as a whole: threads that race see one complete state or another.
        self._copied: _Copied | None = None
        self._live: _Live | None = None
        self._tokens_since_full_look = 0

    def _modules(self) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """What copies are made from: modules, and the names of their parameters."""
        both = ("weight", "bias")
        for layer in self._distinct:
            for module in (*layer.projections, layer.attention_out, layer.ffn_in, layer.ffn_out):
                yield module, both
            attention = layer.attention
            if isinstance(attention, DisentangledAttention):
                for projection in (attention.pos_key, attention.pos_query):
                    if projection is not None and projection not in layer.projections:
                        yield projection, both
                if attention.by_head:
                    yield attention.module, ("q_bias", "v_bias")
        if self._projection is not None:
            yield self._projection, both
        if self._convolution is not None:
            yield self._convolution.conv, both
        if self._positions is not None:
            yield self._positions.table, ("weight",)
            if self._positions.norm is not None:
                yield self._positions.norm, both

    def current(self, like: Tensor, tokens: int) -> EncoderWeights:
        """The weights as the model has them now.

        Args:
            like: a tensor of the model; all weights must share its dtype and device.
            tokens: the size of the batch, which decides how closely the weights are looked at.

        Raises:
            NotFastError: a parameter is of another dtype or device, or is no plain tensor.
        """
        if self._backend != "cpu":
            return self.rewritten(like)
        with torch.inference_mode(False), torch.no_grad():
            return self._verified(like, tokens)

    def rewritten(self, like: Tensor) -> EncoderWeights:
        """The weights as :meth:`current` has them on every backend but ``cpu``: derived anew, by
        work of the device alone, which a CUDA graph can repeat.

        Raises:
            NotFastError: as :meth:`current` does.
        """
        self._check_unprepared(like)
        parameters = self._parameters()
        # Buffers made under inference_mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            return self._rewritten(parameters, like)

    @property
    def buffers(self) -> object:
        """What :meth:`rewritten` writes, to be held by whoever has recorded it."""
        return self._live

    def places(self) -> list[tuple | None]:
        """Where every weight lies and in what form: a recording of :meth:`rewritten` is right for
        as long as this comes out equal.

        Raises:
            NotFastError: a weight is no parameter.
        """
        return list(map(place, [*self._unprepared_parameters(), *self._parameters()]))

    def _parameters(self) -> list[Tensor | None]:
        """What copies are made from."""
        return [_parameter(module, name) for module, name in self._sources]

    def _unprepared_parameters(self) -> list[Tensor | None]:
        """What is used as it lies."""
        return [p for module in self._unprepared for p in module._parameters.values()]

    def _check_unprepared(self, like: Tensor) -> None:
        for parameter in self._unprepared_parameters():
            if parameter is not None:
                _check_plain(parameter, like)

    def _verified(self, like: Tensor, tokens: int) -> EncoderWeights:
        parameters = self._parameters()
        # An edit of what is used as it lies needs no new copies.
        identity = [*map(_identity, parameters), *map(place, self._unprepared_parameters())]
        sources = [parameter for parameter in parameters if parameter is not None]
        known = self._copied
        self._tokens_since_full_look += tokens
        full_look = self._tokens_since_full_look >= FULL_LOOK_TOKENS
        if full_look:
            self._tokens_since_full_look = 0
        if (
            known is not None
            and known.identity == identity
            and known.samples.are_unchanged()
            and (not full_look or known.checksum == checksum_of_all(sources))
        ):
            return known.weights
        self._check_unprepared(like)
        for source in sources:
            _check_plain(source, like)
        # The looks come first: an edit by another thread while the copies are made is then noticed
        # at the next call.
        samples, checksum = Samples(sources), checksum_of_all(sources)
        weights = self._prepare()
        self._copied = _Copied(identity, samples, checksum, weights)
        return weights

    def _rewritten(self, parameters: list[Tensor | None], like: Tensor) -> EncoderWeights:
        places = tuple(map(place, parameters))
        known = self._live
        if known is None or known.places != places:
            sources = [parameter for parameter in parameters if parameter is not None]
            for source in sources:
                _check_plain(source, like)
            weights = self._prepare()
            self._live = _Live(
                places, [source.detach() for source in sources], *self._stacked(weights), weights
            )
            return weights
        if known.stacked:
            torch._foreach_copy_(known.stacked, known.stacked_from)
        return self._with_derived(known.weights)

    def _stacked(self, weights: EncoderWeights) -> tuple[list[Tensor], list[Tensor]]:
        """The parts of the stacks of Q, K and V, and the weights and biases that they repeat."""
        prepared = dict(zip(map(id, self._layers), weights.layers, strict=True))
        parts: list[Tensor] = []
        sources: list[Tensor] = []
        for layer in self._distinct:
            modules = layer.projections
            if len(modules) == 1:
                continue  # used as it lies
            stack = prepared[id(layer)].qkv
            sizes = [module.weight.shape[0] for module in modules]
            parts.extend(stack.weight.split(sizes))
            sources.extend(module.weight.detach() for module in modules)
            if stack.bias is not None:
                for part, module in zip(stack.bias.split(sizes), modules, strict=True):
                    if module.bias is not None:
                        parts.append(part)
                        sources.append(module.bias.detach())
        return parts, sources

    def _with_derived(self, weights: EncoderWeights) -> EncoderWeights:
        """``weights`` with everything computed anew that is more than a copy."""
        derives_bias = any(_has_bias_by_head(layer) for layer in self._distinct)
        if self._positions is None and self._convolution is None and not derives_bias:
            return weights
        tables = project_positions(self._positions, self._distinct, self._backend)
        renewed = {
            id(layer): (_qkv_bias(layer), *layer_tables)
            for layer, layer_tables in zip(self._distinct, tables, strict=True)
        }
        layers = []
        for layer, prepared in zip(self._layers, weights.layers, strict=True):
            bias, pos_key, pos_query = renewed[id(layer)]
            qkv = prepared.qkv if bias is None else replace(prepared.qkv, bias=bias)
            layers.append(replace(prepared, qkv=qkv, pos_key=pos_key, pos_query=pos_query))
        return EncoderWeights(weights.projection, self._prepare_convolution(), layers)

    def _prepare(self) -> EncoderWeights:
        """Prepare everything from the model as it is."""
        tables = project_positions(self._positions, self._distinct, self._backend)
        prepared = {
            id(layer): self._prepare_layer(layer, *layer_tables)
            for layer, layer_tables in zip(self._distinct, tables, strict=True)
        }
        projection = self._projection
        return EncoderWeights(
            None
            if projection is None
            else linear.prepare([projection.weight], [projection.bias], self._backend),
            self._prepare_convolution(),
            [prepared[id(layer)] for layer in self._layers],
        )

    def _prepare_layer(
        self, layer: LayerSpec, pos_key: Tensor | None, pos_query: Tensor | None
    ) -> LayerWeights:
        backend, out, modules = self._backend, layer.attention_out, layer.projections
        biases: list[Tensor | None] = [module.bias for module in modules]
        if _has_bias_by_head(layer):
            biases = [_qkv_bias(layer)]
        ffn_in, ffn_out = layer.ffn_in, layer.ffn_out
        return LayerWeights(
            linear.prepare([module.weight for module in modules], biases, backend),
            linear.prepare([out.weight], [out.bias], backend),
            linear.prepare_feed_forward(
                ffn_in.weight,
                ffn_in.bias,
                ffn_out.weight,
                ffn_out.bias,
                layer.activation,
                layer.gated,
                backend,
            ),
            pos_key,
            pos_query,
        )

    def _prepare_convolution(self) -> PreparedLinear | None:
        """As a linear over windows: a window's tokens one after another, not its features."""
        if self._convolution is None:
            return None
        conv = self._convolution.conv
        weight = conv.weight.detach().transpose(1, 2).flatten(1)
        return linear.prepare([weight], [conv.bias], self._backend)


def _has_bias_by_head(layer: LayerSpec) -> bool:
    return isinstance(layer.attention, DisentangledAttention) and layer.attention.by_head


def _qkv_bias(layer: LayerSpec) -> Tensor | None:
    """DeBERTa v1's biases in the order of its projection: q, k and v of one head after another;
    ``None`` where the biases are those of the projections."""
    attention = layer.attention
    if not _has_bias_by_head(layer):
        return None
    module: Any = attention.module
    q_bias, v_bias = module.q_bias.detach(), module.v_bias.detach()
    parts = (q_bias, torch.zeros_like(q_bias), v_bias)
    return torch.stack([part.view(-1, attention.head_size) for part in parts], dim=1).view(-1)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    # Past Module.__getattr__, which takes as long as all the rest of a look.
    try:
        return module._parameters[name]
    except KeyError:
        raise NotFastError(f"a {type(module).__name__} whose {name} is no parameter") from None


def place(tensor: Tensor | None) -> tuple | None:
    """Which memory a tensor is, and how it reads it."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, type(tensor)


def _identity(tensor: Tensor | None) -> tuple | None:
    """The same, and how often autograd saw it change."""
    if tensor is None:
        return None
    return place(tensor), 0 if tensor.is_inference() else tensor._version


def _check_plain(tensor: Tensor, like: Tensor) -> None:
    """Raise unless ``tensor`` is an ordinary dense tensor of the dtype and device of ``like``."""
    if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
        raise NotFastError(f"a weight is a {type(tensor).__name__}, not a plain tensor")
    if not tensor.is_contiguous() and not (tensor.dim() == 2 and tensor.t().is_contiguous()):
        raise NotFastError(f"a weight with strides {tensor.stride()}")
    if tensor.dtype != like.dtype:
        raise NotFastError(f"weights of {tensor.dtype} and {like.dtype} in one encoder")
    if tensor.device != like.device:
        raise NotFastError(f"weights on {tensor.device} and {like.device} in one encoder")
