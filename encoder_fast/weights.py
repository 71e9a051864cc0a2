"""The weights of a model's linears in the form a backend wants, kept true to the model.

Q, K and V become one GEMM, and on the CPU every weight is reordered for oneDNN. Both are copies, so
each forward first asks whether they still tell the truth, whatever happened to the model since:
``load_state_dict``, ``.to()``, ``.half()``, an edit in place, a new ``Parameter``.

*On the CPU* the copies stand as long as their sources are the same tensors at the same version and
show the same bytes. The version counter sees every edit that autograd sees; an edit through
``.data`` or a NumPy alias it does not see, so the bytes are looked at: a strided sample of each
tensor (microseconds) catches an edit of a whole tensor, and the sum of all bytes, taken where the
batch is big enough for it to cost next to nothing, catches a change of one element.

*On a GPU*, where a look would mean to wait, the stacked Q, K and V weights are written anew in
every forward: one launch that moves 6·N² elements a layer, by computation 20 µs in BERT-base. The
other linears use the live tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from encoder_fast.errors import NotFastError
from encoder_fast.ops import linear
from encoder_fast.ops.linear import PreparedFeedForward, PreparedLinear
from encoder_fast.spec import EncoderSpec, LayerSpec

# From this many tokens on, the sum over all weights costs under 2% of the forward: it reads them at
# some 40 GB/s, and a GEMM does 2 operations a weight and token at some 200 GFLOP/s.
THOROUGH_TOKENS = 1024

# Elements of each tensor that every call looks at.
SAMPLE_SIZE = 64


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The linears of one layer, prepared."""

    qkv: PreparedLinear
    attention_out: PreparedLinear
    feed_forward: PreparedFeedForward


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """The linears of an encoder, prepared: the projection of its embeddings, and each layer's."""

    projection: PreparedLinear | None
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
    total: int
    weights: EncoderWeights


class WeightCache:
    """The prepared weights of one encoder on one backend. Safe to share between threads."""

    def __init__(self, spec: EncoderSpec, backend: str) -> None:
        self._backend = backend
        self._projection = spec.embeddings.projection
        self._layers = spec.layers
        # ALBERT runs one layer many times: its weights are prepared once.
        self._distinct = list({id(layer): layer for layer in spec.layers}.values())
        self._modules = [
            module
            for layer in self._distinct
            for module in (*_qkv(layer), layer.attention_out, layer.ffn_in, layer.ffn_out)
        ]
        if self._projection is not None:
            self._modules.append(self._projection)
        self._unprepared = spec.tables_and_norms
        # Replaced as a whole: threads that race see one complete state or another.
        self._prepared: _Prepared | None = None

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
            for module in self._modules
            for parameter in (module._parameters["weight"], module._parameters["bias"])
            if parameter is not None
        ]
        for source in sources:
            _check_plain(source, like)
        # Buffers made under inference_mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            if like.device.type == "cpu":
                return self._verified(sources, thorough=tokens >= THOROUGH_TOKENS)
            return self._rewritten(sources)

    def _verified(self, sources: list[Tensor], thorough: bool) -> EncoderWeights:
        identity = tuple(
            (s.data_ptr(), s.stride(), 0 if s.is_inference() else s._version) for s in sources
        )
        known = self._prepared
        if (
            known is not None
            and known.identity == identity
            and torch.equal(torch.cat(known.samples), known.sampled)
            and (not thorough or known.total == _byte_sum(sources))
        ):
            return known.weights
        samples = [_sample(s) for s in sources]
        # What is copied is what was looked at: the sums come first, so that an edit by another
        # thread while the copies are made is noticed at the next call.
        sampled, total = torch.cat(samples), _byte_sum(sources)
        weights = self._prepare([None] * len(self._distinct))
        self._prepared = _Prepared(identity, samples, sampled, total, weights)
        return weights

    def _rewritten(self, sources: list[Tensor]) -> EncoderWeights:
        identity = tuple((s.shape, s.dtype, s.device) for s in sources)
        known = self._prepared
        if known is None or known.identity != identity:
            weights = self._prepare([None] * len(self._distinct))
            known = self._prepared = _Prepared(identity, [], torch.empty(0), 0, weights)
        first_use = {id(layer): i for i, layer in reversed(list(enumerate(self._layers)))}
        stacks = [known.weights.layers[first_use[id(layer)]].qkv for layer in self._distinct]
        stacked: list[Tensor] = []
        live: list[Tensor] = []
        for layer, stack in zip(self._distinct, stacks, strict=True):
            modules = _qkv(layer)
            sizes = [module.weight.shape[0] for module in modules]
            stacked.extend(stack.weight.split(sizes))
            live.extend(module.weight.detach() for module in modules)
            if stack.bias is not None:
                for part, module in zip(stack.bias.split(sizes), modules, strict=True):
                    if module.bias is not None:
                        stacked.append(part)
                        live.append(module.bias.detach())
        torch._foreach_copy_(stacked, live)
        return self._prepare(stacks)

    def _prepare(self, stacks: Sequence[PreparedLinear | None]) -> EncoderWeights:
        """Prepare everything; where a stack of Q, K and V is given, it is taken as it is."""
        prepared = {
            id(layer): self._prepare_layer(layer, stack)
            for layer, stack in zip(self._distinct, stacks, strict=True)
        }
        projection = self._projection
        return EncoderWeights(
            None
            if projection is None
            else linear.prepare([projection.weight], [projection.bias], self._backend),
            [prepared[id(layer)] for layer in self._layers],
        )

    def _prepare_layer(self, layer: LayerSpec, stack: PreparedLinear | None) -> LayerWeights:
        backend, out = self._backend, layer.attention_out
        if stack is None:
            modules = _qkv(layer)
            stack = linear.prepare([m.weight for m in modules], [m.bias for m in modules], backend)
        ffn_in, ffn_out = layer.ffn_in, layer.ffn_out
        return LayerWeights(
            stack,
            linear.prepare([out.weight], [out.bias], backend),
            linear.prepare_feed_forward(
                ffn_in.weight, ffn_in.bias, ffn_out.weight, ffn_out.bias, backend
            ),
        )


def _qkv(layer: LayerSpec) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return layer.query, layer.key, layer.value


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
    """A flat view of the elements as integers of their size; it sees later edits."""
    detached = tensor.detach()
    if not detached.is_contiguous():
        detached = detached.t()
    return detached.view(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def _sample(tensor: Tensor) -> Tensor:
    words = _words(tensor)
    # An odd step visits many columns, where an even one might see a single one.
    return words[:: max(1, words.numel() // SAMPLE_SIZE) | 1]


def _byte_sum(tensors: list[Tensor]) -> int:
    total = 0
    for tensor in tensors:
        words = _words(tensor)
        width = 8 // words.element_size()
        if words.numel() % width == 0 and words.storage_offset() % width == 0:
            words = words.view(torch.int64)
        total += int(words.sum())
    return total
