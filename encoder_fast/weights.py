"""The weights of a model's linears in the form a backend wants, kept true to the model.

Q, K and V become one GEMM, DeBERTa's tables of positions are projected, and on the CPU every weight
is reordered for oneDNN. What is derived stands in buffers of its own, so each forward first asks
whether it still tells the truth, whatever happened to the model since: ``load_state_dict``,
``.to()``, ``.half()``, an edit in place, a new ``Parameter``. One rule holds on every backend:

- Another tensor in a weight's place, or one that lies elsewhere or is read another way: everything
  is prepared anew.
- The same tensor, and PyTorch's version counter has moved: what derives from it is derived again.
- An edit that the counter does not see, through ``.data`` or a NumPy array, is found late, once so
  many more tokens have run. On the backend ``cpu`` the bytes tell: all of them are looked at each
  time that another ``FULL_LOOK_TOKENS`` have run, and a sample of each tensor in every call.
  Elsewhere a look would wait for the GPU, so what is derived is simply written again each time that
  another ``REWRITE_TOKENS`` have run. A tensor without a counter (made under ``inference_mode``) is
  always in doubt.

Elsewhere than on the CPU all other linears use the live tensors, and buffers are written again in
place: a CUDA graph that reads them stays right. A stream that did not write them waits for the one
that did (:mod:`encoder_fast.streams`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from encoder_fast.backends.memory import lacks_memory
from encoder_fast.errors import NotFastError
from encoder_fast.fingerprints import Samples, checksum_of_all
from encoder_fast.looks import (
    Watch,
    are_same,
    have_places,
    have_versions,
    is_in_doubt,
    places_of,
    versions_of,
)
from encoder_fast.ops import linear
from encoder_fast.ops.linear import PreparedFeedForward, PreparedLinear
from encoder_fast.position_tables import project_positions, row_of_distance
from encoder_fast.spec import DisentangledAttention, EncoderSpec, LayerSpec, epsilon
from encoder_fast.streams import StreamOrder, is_captured

_BOTH = ("weight", "bias")

# A look at all of MiniLM's bytes takes as long as 30 of its tokens: 3% of the time for every 1,024,
# 12% for every 256.
FULL_LOOK_TOKENS = 1024

# To write a layer's stack of N x N weights anew moves 12 N² bytes in half precision, 4 N² ps at 3
# TB/s; a token's GEMMs are 24 N² operations, 0.05 N² ps at 500 TFLOP/s. So this is 1% of the GPU's
# time by computation, whatever the width. DeBERTa's tables make it 2%.
REWRITE_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The linears of one layer, prepared, and its tables of positions ``(rows, H, D)``."""

    qkv: PreparedLinear
    attention_out: PreparedLinear
    feed_forward: PreparedFeedForward
    pos_key: Tensor | None = None
    pos_query: Tensor | None = None


@dataclass(frozen=True, slots=True, weakref_slot=True)
class EncoderWeights:
    """The linears of an encoder, prepared.

    Attributes:
        projection: of its embeddings.
        convolution: over windows of tokens.
        row_of_distance: for attention by distance, the row of its table for each distance.
        layers: each layer's.
        memory: views of all that the model itself has, so that a CUDA graph may be launched before
            anybody has looked whether it is still there.
    """

    projection: PreparedLinear | None
    convolution: PreparedLinear | None
    row_of_distance: Tensor | None
    layers: list[LayerWeights]
    memory: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Look:
    """A model's weights as they were found: the tensors, where each lies and in what form, and how
    often autograd saw those change that something derives from. Tables are normalised first, by
    an epsilon of their own."""

    tensors: list[Tensor | None]
    places: object
    versions: object
    table_epsilon: float | None

    def finds_same_tensors(self, other: Look) -> bool:
        """Whether everything is what and where it was, whatever it holds."""
        return (
            are_same(self.tensors, other.tensors)
            and self.places == other.places
            and self.table_epsilon == other.table_epsilon
        )


@dataclass(frozen=True, slots=True)
class _Copied:
    """All layers' weights as copies, and what they were made from.

    ``samples`` hold views of the sources: they keep the memory alive, so that no new tensor can
    come to lie at an old address.
    """

    look: Look
    samples: Samples
    checksum: int
    weights: EncoderWeights


@dataclass(slots=True)
class _Live:
    """All layers' weights as views of the sources, and the buffers to write again from them.

    Attributes:
        stacked, stacked_from: the parts of the stacks of Q, K and V, and what they repeat.
        derived: the buffers for what is more than a copy.
        order: of all that a forward reads, on a GPU.
    """

    look: Look
    stacked: list[Tensor]
    stacked_from: list[Tensor]
    derived: list[Tensor]
    weights: EncoderWeights
    order: StreamOrder | None


class WeightCache:
    """The prepared weights of one encoder on one backend. Safe to share between threads."""

    def __init__(self, spec: EncoderSpec, backend: str, watch: Watch | None = None) -> None:
        """
        Args:
            watch: of the modules, looked at ahead of each call, tells when to read them again;
                without it they are read each time.
        """
        self._backend = backend
        self._watch = watch
        self._projection = spec.embeddings.projection
        self._layers = spec.layers
        # ALBERT runs one layer many times: its weights are prepared once.
        self._distinct = list({id(layer): layer for layer in spec.layers}.values())
        self._positions = spec.positions
        self._relative_bias = spec.relative_bias
        self._convolution = spec.convolution
        derived_from = dict.fromkeys(self._modules_derived_from())
        prepared = derived_from | dict.fromkeys(self._modules_used_alone())
        self._prepared = [(module, name) for module, names in prepared for name in names]
        # Those whose edits count, at the front. Where the others lie is enough to know of them.
        copied = prepared if backend == "cpu" else derived_from
        self._counted = sum(len(names) for _, names in copied)
        self._unprepared = spec.tables_and_norms
        self._found: tuple[object, list[Tensor | None]] | None = None
        # Replaced as a whole: threads that race see one complete state or another.
        self._copied: _Copied | None = None
        self._live: _Live | None = None
        self._tokens = 0
        self._lock = Lock()

    def _modules_used_alone(self) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """The linears that a backend may use as they lie, and the names of their parameters."""
        for layer in self._distinct:
            for module in (*layer.projections, layer.attention_out, layer.ffn_in, layer.ffn_out):
                yield module, _BOTH
        if self._projection is not None:
            yield self._projection, _BOTH

    def _modules_derived_from(self) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """What something derives from on every backend."""
        for layer in self._distinct:
            if len(layer.projections) > 1:
                yield from ((module, _BOTH) for module in layer.projections)
            attention = layer.attention
            if isinstance(attention, DisentangledAttention):
                for projection in (attention.pos_key, attention.pos_query):
                    if projection is not None:
                        yield projection, _BOTH
                if attention.by_head:
                    yield attention.module, ("q_bias", "v_bias")
        if self._convolution is not None:
            yield self._convolution.conv, _BOTH
        if self._positions is not None:
            yield self._positions.table, ("weight",)
            if self._positions.norm is not None:
                yield self._positions.norm, _BOTH

    def current(self, like: Tensor, tokens: int) -> EncoderWeights:
        """The weights as the model has them now.

        Args:
            like: a tensor of the model; all weights must share its dtype and device.
            tokens: the size of the batch, which decides how closely the weights are looked at.

        Raises:
            NotFastError: a parameter is of another dtype or device, or is no plain tensor.
            RuntimeError: the storage of one was freed.
        """
        # Buffers made under inference_mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            if self._backend == "cpu":
                return self._verified(like, tokens)
            if is_captured(like.device):
                # Somebody records a CUDA graph of their own. It is to derive everything anew each
                # time that it runs, in memory of its own: nobody looks at the weights then.
                _check_all(self._look().tensors, like)
                return self._prepare()
            with self._lock:
                return self._rewritten(like, tokens)

    def may_run_ahead(self, weights: EncoderWeights, tokens: int) -> Look | None:
        """What was seen of the model when its buffers were last written, if a batch may be launched
        with ``weights`` before :meth:`still_holds` has looked; else ``None``.

        It may if :meth:`current` gave them last, and nothing is due to be written again.
        """
        with self._lock:
            live = self._live
            due = self._tokens + tokens >= REWRITE_TOKENS
            if live is None or live.weights is not weights or due:
                return None
            if is_in_doubt(live.look.versions):
                return None
            self._tokens += tokens
            if live.order is not None:
                live.order.before_reading()
            return live.look

    def still_holds(self, seen: Look) -> bool:
        """Whether the model is what was ``seen``. Not whether it is what was seen last: another
        thread may have written the buffers anew since they were read.

        Raises:
            NotFastError: a weight is no parameter.
        """
        return self._finds(seen) and not is_in_doubt(seen.versions)

    def _finds(self, seen: Look) -> bool:
        """Whether a look would find what was ``seen``, without writing it down."""
        tensors = self._tensors()
        return (
            are_same(tensors, seen.tensors)
            and self._table_epsilon() == seen.table_epsilon
            and have_places(tensors, seen.places)
            and have_versions(tensors[: self._counted], seen.versions)
        )

    def _look(self) -> Look:
        tensors = self._tensors()
        versions = versions_of(tensors[: self._counted])
        return Look(tensors, places_of(tensors), versions, self._table_epsilon())

    def _table_epsilon(self) -> float | None:
        norm = None if self._positions is None else self._positions.norm
        return None if norm is None else epsilon(norm)

    def _tensors(self) -> list[Tensor | None]:
        """The weights that the modules have now, those that are prepared at the front."""
        found, mark = self._found, None if self._watch is None else self._watch.mark
        if found is not None and mark is not None and found[0] is mark:
            return found[1]
        try:
            tensors = [module._parameters[name] for module, name in self._prepared]
        except KeyError:
            module, name = next((m, n) for m, n in self._prepared if n not in m._parameters)
            reason = f"a {type(module).__name__} whose {name} is no parameter"
            raise NotFastError(reason) from None
        for module in self._unprepared:
            tensors += module._parameters.values()
        self._found = mark, tensors
        return tensors

    def _verified(self, like: Tensor, tokens: int) -> EncoderWeights:
        known = self._copied
        self._tokens += tokens
        full_look = self._tokens >= FULL_LOOK_TOKENS
        if full_look:
            self._tokens = 0
        if (
            known is not None
            and self._finds(known.look)
            and known.samples.are_unchanged()
            and (not full_look or known.checksum == checksum_of_all(self._sources(known.look)))
        ):
            return known.weights
        look = self._look()
        sources = self._sources(look)
        _check_all(look.tensors, like)
        # The looks come first: an edit by another thread while the copies are made is then noticed
        # at the next call.
        samples, checksum = Samples(sources), checksum_of_all(sources)
        weights = self._prepare()
        self._copied = _Copied(look, samples, checksum, weights)
        return weights

    def _rewritten(self, like: Tensor, tokens: int) -> EncoderWeights:
        live = self._live
        self._tokens += tokens
        if live is not None and self._tokens < REWRITE_TOKENS and self.still_holds(live.look):
            if live.order is not None:
                live.order.before_reading()
            return live.weights
        # Ahead of what is derived: an edit by another thread meanwhile shows at the next call.
        look = self._look()
        if live is not None and look.finds_same_tensors(live.look) and self._write(live):
            live.look = look
        else:
            _check_all(look.tensors, like)
            self._live = live = self._prepare_live(look)
        self._tokens = 0
        return live.weights

    def _sources(self, look: Look) -> list[Tensor]:
        """What is prepared, of what was found."""
        return [tensor for tensor in look.tensors[: len(self._prepared)] if tensor is not None]

    def _prepare_live(self, look: Look) -> _Live:
        memory = tuple(tensor.detach() for tensor in look.tensors if tensor is not None)
        weights = replace(self._prepare(), memory=memory)
        stacked, stacked_from = self._stacked(weights)
        derived = self._derived(weights)
        rows = [] if weights.row_of_distance is None else [weights.row_of_distance]
        order = StreamOrder.of([*memory, *stacked, *derived, *rows])
        return _Live(look, stacked, stacked_from, derived, weights, order)

    def _write(self, live: _Live) -> bool:
        """Derive everything again, in place; False where that can't be done now."""

        def launch() -> None:
            if live.stacked:
                torch._foreach_copy_(live.stacked, live.stacked_from)
            if live.derived:
                torch._foreach_copy_(live.derived, self._derive())

        if live.order is not None:
            return live.order.write(launch)
        launch()
        return True

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

    def _derived(self, weights: EncoderWeights) -> list[Tensor]:
        """The buffers of ``weights`` for what is more than a copy, in the order of
        :meth:`_derive`."""
        prepared = dict(zip(map(id, self._layers), weights.layers, strict=True))
        found: list[Tensor | None] = []
        for layer in self._distinct:
            its = prepared[id(layer)]
            bias = its.qkv.bias if _has_bias_by_head(layer) else None
            found += (its.pos_key, its.pos_query, bias)
        if weights.convolution is not None:
            found.append(weights.convolution.weight)
        return [buffer for buffer in found if buffer is not None]

    def _derive(self) -> list[Tensor]:
        """DeBERTa's tables of positions, v1's biases by head and v2's convolution, as the weights
        are now."""
        found: list[Tensor | None] = []
        tables = project_positions(self._positions, self._distinct, self._backend)
        for layer, pair in zip(self._distinct, tables, strict=True):
            found += (*pair, _qkv_bias(layer))
        convolution = self._prepare_convolution()
        if convolution is not None:
            found.append(convolution.weight)
        return [tensor for tensor in found if tensor is not None]

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
            row_of_distance(self._positions, self._relative_bias),
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


def _check_all(tensors: list[Tensor | None], like: Tensor) -> None:
    for tensor in tensors:
        if tensor is not None:
            _check_plain(tensor, like)


def _check_plain(tensor: Tensor, like: Tensor) -> None:
    """Raise unless ``tensor`` is an ordinary dense tensor of the dtype and device of ``like``.

    Where it has no memory, ``RuntimeError``: the original raises the same or kills the process.
    """
    if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
        raise NotFastError(f"a weight is a {type(tensor).__name__}, not a plain tensor")
    if not tensor.is_contiguous() and not (tensor.dim() == 2 and tensor.t().is_contiguous()):
        raise NotFastError(f"a weight with strides {tensor.stride()}")
    if tensor.dtype != like.dtype:
        raise NotFastError(f"weights of {tensor.dtype} and {like.dtype} in one encoder")
    if tensor.device != like.device:
        raise NotFastError(f"weights on {tensor.device} and {like.device} in one encoder")
    if lacks_memory(tensor):
        raise RuntimeError(f"a weight of shape {tuple(tensor.shape)} whose storage was freed")
