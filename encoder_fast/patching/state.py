"""One patched encoder: its options, its counts, and the decision for each call."""

from __future__ import annotations

import functools
import importlib
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from encoder_fast import engine
from encoder_fast.backends import load, resolve
from encoder_fast.errors import (
    BackendUnavailableError,
    FallbackError,
    NotFastError,
    UnsupportedModelError,
)
from encoder_fast.families import Family
from encoder_fast.families.family import check_buffers
from encoder_fast.graphs import GraphCache, GraphCounts, Replayed, recorder_for
from encoder_fast.ops.attention import why_no_head_size
from encoder_fast.packing import PackedBatch
from encoder_fast.patching.arguments import (
    Arguments,
    parameter_names,
    read_arguments,
    setting,
)
from encoder_fast.patching.head import is_watched, told_of
from encoder_fast.patching.inputs import inputs_of, pack_call, positions_of
from encoder_fast.patching.readers import POOLING, Readers, Surroundings
from encoder_fast.patching.reporting import Counts
from encoder_fast.patching.sentence import PackedPooling, pooling_behind
from encoder_fast.patching.stack import Stack
from encoder_fast.spec import EncoderSpec
from encoder_fast.weights import WeightCache

NOT_FAST = object()
"""What :meth:`EncoderState.attempt` returns where the original forward has to run."""


@dataclass(slots=True)
class _Reading:
    """The model as it was read, on the device where it was."""

    owner: weakref.ref[nn.Module]
    forward: Any
    spec: EncoderSpec
    stack: Stack
    device: torch.device
    backend: str
    why: str
    cache: WeightCache
    graphs: GraphCache | None
    sizes: set[tuple[int, torch.dtype]] = field(default_factory=set)
    """Those that this model has been computed in, where the backend has sizes."""
    mark_of_attention: object = None
    """Of the modules, when their attention was last found to be one that runs fast."""

    def still_holds(self, model: nn.Module, original: Any) -> bool:
        # To ask the module for its attribute takes five times as long.
        words = self.spec.embeddings.word._parameters.get("weight")
        return (
            self.owner() is model
            and self.forward is original.forward
            and self.stack.is_unchanged(model)
            and words is not None
            and words.device == self.device
        )

    def check_attention(self, config: Any) -> None:
        """
        Raises:
            NotFastError: the model was told to attend in another way, or what it would call was
                replaced.
        """
        mark = self.stack.watch.mark
        if mark is not self.mark_of_attention:
            for own in (config, *self.stack.configs):
                _check_attention(own, self.spec)
                self.stack.code.check(getattr(own, "_attn_implementation", None))
            self.mark_of_attention = mark


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A call that was begun by a reading that nobody has looked at since.

    Attributes:
        replayed: what a CUDA graph gave, where there was one for the batch.
    """

    reading: _Reading
    batch: PackedBatch
    replayed: Replayed | None


class EncoderState:
    """What a patched encoder carries in its ``__dict__``.

    It owns no parameter. A copy of the model gets a state of its own with the same options, which
    reads that copy at its first call.
    """

    entry = "forward"

    def __init__(
        self,
        family: Family,
        original: Any,
        backend: str,
        strict: bool,
        surroundings: Surroundings,
        cuda_graphs: bool = False,
    ) -> None:
        self.family = family
        self.surroundings = surroundings
        self.original = original
        self.backend = backend
        self.strict = strict
        self.counts = Counts()
        self.graph_counts = GraphCounts() if cuda_graphs else None
        # Replaced as a whole: threads that race see one reading or another.
        self._reading: _Reading | None = None
        # A model that fell back is likely to do so again, and a graph launched for it is in vain.
        self._launches_ahead = True

    def __copy__(self) -> EncoderState:
        # The copy of an encoder is held by nobody; see _State in swap.py for copies of its holder.
        return EncoderState(
            self.family,
            self.original,
            self.backend,
            self.strict,
            Surroundings(self.family, []),
            self.graph_counts is not None,
        )

    @property
    def chosen(self) -> tuple[str, str]:
        """The backend in use and why; the one asked for before the model was first read."""
        reading = self._reading
        return (self.backend, "not read yet") if reading is None else (reading.backend, reading.why)

    def read(self, model: nn.Module) -> _Reading:
        """Read the model as it is now.

        Raises:
            UnsupportedModelError: it can't run fast in any call.
            RuntimeError: the storage of a buffer was freed.
            BackendUnavailableError: the backend can't run where the model is, or there are no CUDA
                graphs.
        """
        if not self.family.matches(self.original):
            raise UnsupportedModelError(f"the forward of {self.original.__name__} was replaced")
        check_buffers(model, self.family.stack)
        spec = self.family.read(model)
        if not spec.layers:
            raise UnsupportedModelError("no layers, so nothing to run fast")
        device = spec.embeddings.word.weight.device
        backend, why = resolve(self.backend, device, spec.needs)
        lacking = spec.needs & getattr(load(backend), "LACKING", frozenset())
        if lacking:
            raise UnsupportedModelError(f"backend {backend!r} has no {', '.join(sorted(lacking))}")
        by_distance = "disentangled_attention" in spec.needs
        op = "disentangled_attention" if by_distance else "attention"
        for head_size in sorted(spec.head_sizes):
            reason = why_no_head_size(backend, head_size, op)
            if reason is not None:
                raise UnsupportedModelError(reason)
        stack = Stack(model, self.family)
        cache = WeightCache(spec, backend, stack.watch)
        graphs = None
        if self.graph_counts is not None:
            recorder = recorder_for(backend, device)
            graphs = GraphCache(spec, backend, cache, stack.watch, recorder, self.graph_counts)
        reading = _Reading(
            weakref.ref(model),
            self.original.forward,
            spec,
            stack,
            device,
            backend,
            why,
            cache,
            graphs,
        )
        self._reading = reading
        return reading

    # The decision reads Python objects all over the model; a tracer has nothing to gain from it.
    @torch.compiler.disable
    def attempt(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run one call fast, or count why not and return :data:`NOT_FAST`."""
        try:
            output = self._run(model, args, kwargs)
        except NotFastError as refusal:
            reason = str(refusal)
            self.counts.count_fallback(reason)
            if self.strict:
                raise FallbackError(
                    f"strict=True, and this call can't run fast: {reason}"
                ) from None
            return NOT_FAST
        self.counts.count_fast()
        return output

    @torch.compiler.disable
    def encode_packed(
        self, model: nn.Module, inputs: dict[str, Any], first_token_alone: bool
    ) -> Tensor:
        """Run one call fast and leave the last hidden state packed, ``(total, N)``, or ``(B, N)``
        of the first tokens.

        Raises:
            NotFastError: it can't run fast; nothing is counted.
        """
        _check_mode(model)
        call = read_arguments(self.original, model.config, (), inputs)
        hidden, batch = self._encode(
            model, call, POOLING, False, collect=None, first_token_alone=first_token_alone
        )
        self.counts.count_fast()
        return hidden if first_token_alone else batch.without_filler(hidden)

    def _run(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        # Ahead of the arguments: while a model is trained, that is the reason to tell.
        _check_mode(model)
        call = read_arguments(self.original, model.config, args, kwargs)
        pooling = pooling_behind(model)
        if pooling is not None and not call.output_hidden_states:
            return self._output(call, self._pool(model, call, pooling), None, None)
        has_pooler = getattr(model, "pooler", None) is not None
        collect: list[Tensor] | None = [] if call.output_hidden_states else None
        told = told_of(model)
        alone = told is not None and told.alone
        first_alone = alone and collect is None
        readers = self.surroundings.readers(model)
        hidden, batch = self._encode(
            model, call, readers, has_pooler or alone, collect, first_alone
        )
        if batch.indices is not None and not first_alone:
            for reader in readers.own:
                self.counts.count_zeros(reader)
        if first_alone:
            last = with_first = hidden.unsqueeze(1)
        else:
            last = with_first = batch.unpack(hidden)
            if batch.onlooker_rows is not None:
                with_first = batch.unpack(hidden, onlookers=True)
        pooled = self._pool_first(model, with_first) if has_pooler else None
        states = None
        if collect is not None:
            count, wanted = len(collect), call.hidden_states
            kept = range(count) if wanted is None else [i + count if i < 0 else i for i in wanted]
            states = tuple(
                None if index not in kept else last if state is hidden else batch.unpack(state)
                for index, state in enumerate(collect)
            )
        if alone and not has_pooler:
            # The head reads the first column of this; whoever asked for the states sees zeros.
            last = with_first
        return self._output(call, last, pooled, states)

    def _pool(self, model: nn.Module, call: Arguments, pooling: PackedPooling) -> Tensor:
        hidden, batch = self._encode(
            model,
            call,
            POOLING,
            False,
            collect=None,
            first_token_alone=pooling.first_token_alone,
        )
        self.counts.count_pooled()
        return pooling.pool(hidden, batch, self.chosen[0])

    def _pool_first(self, model: Any, padded: Tensor) -> Tensor:
        """By the model's own pooler; all of them read column 0 alone. As a view that would have a
        stride that differs with S, and oneDNN keeps a primitive for each."""
        pooler = model.pooler
        if padded.device.type == "cpu" and not is_watched(pooler):
            first = padded[:, 0].clone(memory_format=torch.contiguous_format)
            padded = first.unsqueeze(1).expand(padded.shape)
        return self.family.pool(model, padded)

    def _encode(
        self,
        model: nn.Module,
        call: Arguments,
        readers: Readers,
        reads_first: bool,
        collect: list[Tensor] | None,
        first_token_alone: bool,
    ) -> tuple[Tensor, PackedBatch]:
        """The last hidden state, packed, and how it is packed; see :func:`engine.encode`."""
        _check_tensors(call)
        ahead: _Ahead | None = None
        if collect is None and self._launches_ahead:
            ahead = self._launch(call, readers, reads_first, first_token_alone)
        self._launches_ahead = False
        reading = self._current_reading(model)
        reading.check_attention(model.config)
        self._launches_ahead = True
        if ahead is not None and ahead.reading is reading:
            batch, replayed = ahead.batch, ahead.replayed
            assert reading.graphs is not None
            if replayed is not None and reading.graphs.confirm(replayed):
                return replayed.output, batch
        else:
            batch = pack_call(call, reading.spec, reading.backend, reads_first, readers)
        if batch.onlooker_rows is not None and _leaves_padding_out(model.config):
            raise NotFastError(
                "a pooler or head over a padded first column (left padding), and flash attention, "
                "which computes nothing for padding"
            )
        like, backend = reading.spec.embeddings.word.weight, reading.backend
        kernels: Any = load(backend)
        if not hasattr(kernels, "rows_to_compute"):
            return self._compute(call, reading, batch, collect, first_token_alone), batch
        batch = batch.filled(kernels.rows_to_compute(batch.total))
        size = batch.total + batch.filler, like.dtype
        if size in reading.sizes:
            return self._compute(call, reading, batch, collect, first_token_alone), batch
        with kernels.first_of_a_size():
            last = self._compute(call, reading, batch, collect, first_token_alone)
        reading.sizes.add(size)
        return last, batch

    def _launch(
        self, call: Arguments, readers: Readers, reads_first: bool, first_token_alone: bool
    ) -> _Ahead | None:
        """Launch a CUDA graph by the reading that there is, so that the GPU is at work while the
        host looks whether model and weights are still what was read."""
        reading = self._reading
        if reading is None or reading.graphs is None:
            return None
        try:
            batch = pack_call(call, reading.spec, reading.backend, reads_first, readers)
            inputs = inputs_of(call, reading.spec, batch)
            return _Ahead(reading, batch, reading.graphs.replay_ahead(inputs, first_token_alone))
        except Exception:
            # A reading of another model refuses what is right for this one. If it is of this model,
            # the same comes of it once more.
            return None

    def _compute(
        self,
        call: Arguments,
        reading: _Reading,
        batch: PackedBatch,
        collect: list[Tensor] | None,
        first_token_alone: bool,
    ) -> Tensor:
        """The last hidden state of a batch, packed."""
        spec, backend = reading.spec, reading.backend
        inputs = inputs_of(call, spec, batch)
        why_no_graph: str | None = None
        if reading.graphs is not None:
            found = reading.graphs.run(
                inputs, first_token_alone=first_token_alone, every_state=collect is not None
            )
            if isinstance(found, Tensor):
                return found
            why_no_graph = found
        positions = positions_of(inputs, spec.embeddings.position_padding_idx)
        ids, types, embeds = (
            None if padded is None else batch.pack(padded)
            for padded in (call.input_ids, call.token_type_ids, call.inputs_embeds)
        )
        weights = reading.cache.current(spec.embeddings.word.weight, batch.total)
        hidden = engine.embed(
            spec.embeddings, weights.projection, backend, positions, types, ids, embeds
        )
        if collect is not None:
            collect.append(hidden)
        last = engine.encode(
            spec, weights, backend, batch, positions, hidden, collect, first_token_alone
        )
        if self.graph_counts is not None and why_no_graph is not None:
            self.graph_counts.count_without(why_no_graph)
        return last

    def _current_reading(self, model: nn.Module) -> _Reading:
        reading = self._reading
        if reading is not None and reading.still_holds(model, self.original):
            return reading
        try:
            reading = self.read(model)
            reading.stack.is_unchanged(model)  # for its objections
            return reading
        except UnsupportedModelError as error:
            raise NotFastError(str(error)) from None
        except BackendUnavailableError as error:
            # What was asked for never gives way to something else.
            if self.backend != "auto" or self.graph_counts is not None:
                raise
            raise NotFastError(str(error)) from None

    def _output(
        self, call: Arguments, last: Tensor, pooled: Tensor | None, states: tuple | None
    ) -> Any:
        output_class = _output_class(self.family.output_class)
        fields: dict[str, Any] = {"last_hidden_state": last, "hidden_states": states}
        has_pooled = "pooler_output" in output_class.__dataclass_fields__
        if has_pooled:
            fields["pooler_output"] = pooled
        output = output_class(**fields)
        if call.return_dict:
            return output
        # transformers 4 keeps the place of a pooled output that is None, 5 leaves it out.
        if has_pooled and pooled is None and "return_dict" in parameter_names(self.original):
            return (last, None, *(() if states is None else (states,)))
        return output.to_tuple()


@functools.cache
def _output_class(name: str) -> Any:
    return getattr(importlib.import_module("transformers.modeling_outputs"), name)


# Implementations that all compute softmax(q kᵀ · scale) v; any other is somebody's own.
_ATTENTIONS = (
    None,
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)


def _check_attention(config: Any, spec: EncoderSpec) -> None:
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in _ATTENTIONS:
        raise NotFastError(f"attn_implementation={implementation!r}")
    for layer in spec.layers:
        attributes = layer.attention.module.__dict__
        if attributes.get("is_causal") or attributes.get("is_decoder"):
            raise NotFastError("a causal attention module")


def _leaves_padding_out(config: Any) -> bool:
    """Whether the original's attention gives zeros for padding, where others give what it sees."""
    return str(getattr(config, "_attn_implementation", None)).startswith("flash")


def _check_mode(model: nn.Module) -> None:
    for name in ("is_decoder", "is_causal"):
        if setting(model.config, name, False):
            raise NotFastError(name)
    if model.training:
        raise NotFastError("training mode (call model.eval())")
    if model.__dict__.get("_is_replica"):
        raise NotFastError("a replica of nn.DataParallel")
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        raise NotFastError(_GRADIENTS)
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotFastError("torch.func or forward-mode autograd")
    if torch.jit.is_tracing():
        raise NotFastError("torch.jit tracing")


def _check_tensors(call: Arguments) -> None:
    embeds = call.inputs_embeds
    if embeds is not None and embeds.requires_grad and torch.is_grad_enabled():
        raise NotFastError(_GRADIENTS)
    if torch.is_autocast_enabled(call.source.device.type):
        raise NotFastError("autocast (cast the model instead: model.half() or model.bfloat16())")


_GRADIENTS = "gradients are enabled (use torch.inference_mode() or torch.no_grad())"
