"""The weights of a model's linears in the form a backend wants, kept true to the model.

Q, K and V become one GEMM, and on the CPU every weight is reordered for oneDNN. Both are copies, so
each forward first asks whether they still tell the truth, whatever happened to the model since:
``load_state_dict``, ``.to()``, ``.half()``, an edit in place, a new ``Parameter``.

*On the CPU* the copies stand as long as their sources are the same tensors at the same version and
show the same bytes. The version counter sees every edit that autograd sees; an edit through
``.data`` or a NumPy alias it does not see, so the bytes are looked at: a sample of each tensor in
every call, which catches an edit of a whole tensor, and all of them each time that another
``FULL_LOOK_TOKENS`` tokens have run, so that no change stays unseen for longer.

*On a GPU*, where a look would mean to wait, the stacked Q, K and V weights are written anew in
every forward: one launch that moves 6·N² elements a layer, by computation 20 µs in BERT-base. The
other linears use the live tensors.

DeBERTa's tables of projected positions are derived from weights alone too. On the CPU they are kept
by the same rule. On a GPU no rule tells a changed weight without a wait, so they are projected anew
in every forward, all layers in one GEMM: in DeBERTa-base 14 GFLOP, and 4·N² elements a layer moved
to lie side by side, by computation 40 µs, against 170 µs for a small GEMM a layer and table.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from encoder_fast.errors import NotFastError
from encoder_fast.ops import linear
from encoder_fast.ops.linear import PreparedFeedForward, PreparedLinear
from encoder_fast.position_tables import project_positions
from encoder_fast.spec import ConvolutionSpec, DisentangledAttention, EncoderSpec, LayerSpec

# A look at all of MiniLM's bytes takes as long as 30 of its tokens: 3% of the time for every 1,024,
# 12% for every 256.
FULL_LOOK_TOKENS = 1024

# Each call looks at this many runs of each tensor, of a cache line each.
SAMPLE_RUNS, RUN_BYTES = 4, 64


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
class _Prepared:
    """All layers' weights, and what they were made from.

    ``samples`` are views of the sources: they keep the memory alive, so that no new tensor can
    come to lie at an old address.
    """

    identity: tuple
    samples: list[Tensor]
    sampled: Tensor
    checksum: int
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
        self._prepared: _Prepared | None = None
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
        for module in self._unprepared:
            for parameter in module._parameters.values():
                if parameter is not None:
                    _check_plain(parameter, like)
        sources = [
            parameter
            for module, name in self._sources
            if (parameter := _parameter(module, name)) is not None
        ]
        # Buffers made under inference_mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            if like.device.type == "cpu":
                return self._verified(sources, like, tokens)
            return self._rewritten(sources, like)

    def _verified(self, sources: list[Tensor], like: Tensor, tokens: int) -> EncoderWeights:
        identity = tuple(map(_identity, sources))
        known = self._prepared
        self._tokens_since_full_look += tokens
        full_look = self._tokens_since_full_look >= FULL_LOOK_TOKENS
        if full_look:
            self._tokens_since_full_look = 0
        if (
            known is not None
            and known.identity == identity
            and torch.equal(torch.cat(known.samples), known.sampled)
            and (not full_look or known.checksum == _checksum(sources))
        ):
            return known.weights
        for source in sources:
            _check_plain(source, like)
        # The looks come first: an edit by another thread while the copies are made is then noticed
        # at the next call.
        samples = [run for source in sources for run in _sample(source)]
        sampled, checksum = torch.cat(samples), _checksum(sources)
        weights = self._prepare([None] * len(self._distinct))
        self._prepared = _Prepared(identity, samples, sampled, checksum, weights)
        return weights

    def _rewritten(self, sources: list[Tensor], like: Tensor) -> EncoderWeights:
        for source in sources:
            _check_plain(source, like)
        present = tuple(module._parameters.get(name) is None for module, name in self._sources)
        identity = (present, *((s.shape, s.dtype, s.device) for s in sources))
        known = self._prepared
        if known is None or known.identity != identity:
            weights = self._prepare([None] * len(self._distinct))
            known = self._prepared = _Prepared(identity, [], torch.empty(0), 0, weights)
        first_use = {id(layer): i for i, layer in reversed(list(enumerate(self._layers)))}
        # A single projection for all of Q, K and V is used as it lies.
        stacks = [
            known.weights.layers[first_use[id(layer)]].qkv if len(layer.projections) > 1 else None
            for layer in self._distinct
        ]
        stacked: list[Tensor] = []
        live: list[Tensor] = []
        for layer, stack in zip(self._distinct, stacks, strict=True):
            if stack is None:
                continue
            modules = layer.projections
            sizes = [module.weight.shape[0] for module in modules]
            stacked.extend(stack.weight.split(sizes))
            live.extend(module.weight.detach() for module in modules)
            if stack.bias is not None:
                for part, module in zip(stack.bias.split(sizes), modules, strict=True):
                    if module.bias is not None:
                        stacked.append(part)
                        live.append(module.bias.detach())
        if stacked:
            torch._foreach_copy_(stacked, live)
        return self._prepare(stacks)

    def _prepare(self, stacks: Sequence[PreparedLinear | None]) -> EncoderWeights:
        """Prepare everything; where a stack of Q, K and V is given, it is taken as it is."""
        backend = self._backend
        tables = project_positions(self._positions, self._distinct, backend)
        prepared = {
            id(layer): self._prepare_layer(layer, stack, *layer_tables)
            for layer, stack, layer_tables in zip(self._distinct, stacks, tables, strict=True)
        }
        projection, convolution = self._projection, self._convolution
        return EncoderWeights(
            None
            if projection is None
            else linear.prepare([projection.weight], [projection.bias], backend),
            None if convolution is None else _prepare_convolution(convolution, backend),
            [prepared[id(layer)] for layer in self._layers],
        )

    def _prepare_layer(
        self,
        layer: LayerSpec,
        stack: PreparedLinear | None,
        pos_key: Tensor | None,
        pos_query: Tensor | None,
    ) -> LayerWeights:
        backend, out = self._backend, layer.attention_out
        if stack is None:
            modules = layer.projections
            biases: list[Tensor | None] = [module.bias for module in modules]
            if isinstance(layer.attention, DisentangledAttention) and layer.attention.by_head:
                biases = [_bias_by_head(layer.attention)]
            stack = linear.prepare([m.weight for m in modules], biases, backend)
        ffn_in, ffn_out = layer.ffn_in, layer.ffn_out
        return LayerWeights(
            stack,
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


def _bias_by_head(attention: DisentangledAttention) -> Tensor:
    """DeBERTa v1's biases in the order of its projection: q, k and v of one head after another."""
    module: Any = attention.module
    q_bias, v_bias = module.q_bias.detach(), module.v_bias.detach()
    parts = (q_bias, torch.zeros_like(q_bias), v_bias)
    return torch.stack([part.view(-1, attention.head_size) for part in parts], dim=1).view(-1)


def _prepare_convolution(spec: ConvolutionSpec, backend: str) -> PreparedLinear:
    """As a linear over windows: a window's tokens one after another, not its features."""
    bias = spec.conv.bias
    weight = spec.conv.weight.detach().transpose(1, 2).flatten(1)
    return linear.prepare([weight], [bias], backend)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    # Past Module.__getattr__, which takes as long as all the rest of a look.
    try:
        return module._parameters[name]
    except KeyError:
        raise NotFastError(f"a {type(module).__name__} whose {name} is no parameter") from None


def _identity(tensor: Tensor) -> tuple:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype, type(tensor)


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


def _words(tensor: Tensor) -> Tensor:
    """The elements as integers of their size, ``(rows, columns)``; a view that sees later edits."""
    detached = tensor.detach()
    if not detached.is_contiguous():
        detached = detached.t()
    rows = detached.view(detached.shape[0] if detached.dim() == 2 else 1, -1)
    return rows.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def _sample(tensor: Tensor) -> list[Tensor]:
    """Short runs of elements, spread evenly over the tensor; views that see later edits."""
    words = _words(tensor).view(-1)
    run = RUN_BYTES // words.element_size()
    step = max(run, words.numel() // SAMPLE_RUNS)
    return [words[i : i + run] for i in range(0, words.numel(), step)]


def _checksum(tensors: list[Tensor]) -> int:
    return sum((index + 1) * _checksum_of(tensor) for index, tensor in enumerate(tensors))


@functools.cache
def _odd_numbers(count: int) -> Tensor:
    return torch.arange(count).mul_(2).add_(1)


def _checksum_of(tensor: Tensor) -> int:
    """A sum of all bytes that also depends on the order of rows and columns."""
    words = _words(tensor)
    width = 8 // words.element_size()
    if words.shape[1] % width == 0 and words.storage_offset() % width == 0:
        words = words.view(torch.int64)
    # Odd factors tell one row from another. Exchanged columns leave the rows' sums alone, but they
    # show in any row: a few are enough to see them.
    some_rows = words[:: max(1, words.shape[0] // 4)]
    row_factors, column_factors = (_odd_numbers(size) for size in words.shape)
    return int((words.sum(dim=1) * row_factors).sum() + (some_rows * column_factors).sum())
