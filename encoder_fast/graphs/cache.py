"""The graphs of one patched encoder, by the sizes that they are for.

A graph covers the embeddings and the layers, from packed ids to the packed last hidden state. It
reads static buffers, into which each batch is copied, with what fills up the bucket behind it; the
real rows of its output are copied out. What derives from weights alone (the stacked Q, K and V,
DeBERTa's tables) it reads where that lies.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from weakref import ref

import torch
from torch import Tensor

from encoder_fast import engine
from encoder_fast.graphs.bucket import Bucket, fewest_tokens, linear_parameters, most_tokens
from encoder_fast.graphs.counts import GraphCounts
from encoder_fast.graphs.premises import Premises
from encoder_fast.graphs.recorder import Recorder, Recording, RecordingFailedError
from encoder_fast.looks import Watch
from encoder_fast.packing import PackedBatch
from encoder_fast.spec import EncoderSpec
from encoder_fast.weights import EncoderWeights, Look, WeightCache

MOST_GRAPHS = 64
"""Beyond these the one that was not used for the longest time goes."""

# Sizes that came once are remembered up to so many.
_MOST_SEEN = 1024


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a forward reads beside weights.

    Attributes:
        batch: how the tokens are packed.
        input_ids: integers ``(B, S)``; ``None`` where embeddings came instead.
        token_type_ids: integers ``(B, S)`` or ``(1, S)``; ``None`` means zeros.
        position_ids: the same; ``None`` means columns.
    """

    batch: PackedBatch
    input_ids: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a graph gave, and the model that it was right for."""

    output: Tensor
    premises: tuple
    seen: Look


class GraphCache:
    """Graphs of one encoder on one device. Safe to share between threads, which take turns."""

    def __init__(
        self,
        spec: EncoderSpec,
        backend: str,
        weights: WeightCache,
        watch: Watch,
        recorder: Recorder,
        counts: GraphCounts,
    ) -> None:
        """
        Args:
            watch: of the encoder's modules. Whoever asks for a graph has looked at it, and at the
                buffers; a model with other ones gets another cache.

        Raises:
            UnsupportedModelError: the model can't be recorded.
        """
        self._spec = spec
        self._backend = backend
        self._weights = weights
        self._recorder = recorder
        self._counts = counts
        self._premises = Premises(spec, watch)
        self._parameters = linear_parameters(spec)
        self._held: _Held | None = None
        self._graphs: OrderedDict[_Key, _Graph] = OrderedDict()
        self._seen: OrderedDict[_Key, None] = OrderedDict()
        # Sizes that could not be recorded and why. To try again would take longer each time than
        # the forward does.
        self._failed: dict[_Key, str] = {}
        self._lock = Lock()

    def replay_ahead(self, inputs: Inputs, first_token_alone: bool) -> Replayed | None:
        """Launch the graph that there is for a batch before anybody has looked whether it is right,
        which takes the host long: the GPU is at work meanwhile. Nothing is counted before
        :meth:`confirm`.

        A graph of another model does no harm: the weights that it reads keep their memory until
        somebody has looked at them, and the ids lie within its tables.

        Returns:
            ``None`` where there is no graph that may be right.
        """
        if self._why_not(inputs, False) is not None:
            return None
        key = _Key.of(inputs, first_token_alone)
        with self._lock:
            graph, held = self._graphs.get(key), self._held
            # Until the graph is launched, this keeps the memory that it reads.
            weights = None if held is None else held.weights()
            if (
                graph is None
                or held is None
                or weights is None
                or held.rows_of_tables != self._rows_of_tables()
                or (seen := self._weights.may_run_ahead(weights, inputs.batch.total)) is None
            ):
                return None
            self._graphs.move_to_end(key)
            return Replayed(self._replay(key, graph, inputs), held.premises, seen)

    def confirm(self, replayed: Replayed) -> bool:
        """Whether the graph was right, and the weights of now are what it read. If not, its output
        is of no use.

        Raises:
            NotFastError: a weight is no parameter.
        """
        if replayed.premises != self._premises.now():
            return False
        if not self._weights.still_holds(replayed.seen):
            return False
        self._counts.count_replayed()
        return True

    def run(self, inputs: Inputs, *, first_token_alone: bool, every_state: bool) -> Tensor | str:
        """The last hidden state as :func:`engine.encode` gives it, or why this call has to run
        without a graph.

        Args:
            every_state: the hidden states of all layers are wanted.

        Raises:
            NotFastError: the weights are such that the engine can't run at all.
        """
        reason = self._why_not(inputs, every_state)
        if reason is not None:
            return reason
        key = _Key.of(inputs, first_token_alone)
        with self._lock:
            weights = self._weights.current(self._like, inputs.batch.total)
            self._drop_if_outdated(weights)
            found = self._graph_of(key, inputs, weights)
            if isinstance(found, str):
                return found
            result = self._replay(key, found, inputs)
        self._counts.count_replayed()
        return result

    def _why_not(self, inputs: Inputs, every_state: bool) -> str | None:
        batch = inputs.batch
        if inputs.input_ids is None:
            return "inputs_embeds"
        if every_state:
            return "output_hidden_states"
        if batch.onlooker_rows is not None:
            return "a pooler or head over a padded first column (left padding)"
        if batch.has_gaps and self._spec.sees_gaps(batch.padded_length):
            return "a mask with holes, and attention that goes by distance"
        if batch.total == 0:
            return "a batch without a token"
        # To read dtype and settings takes the host as long as to launch a kernel.
        if batch.total > fewest_tokens(self._parameters):
            limit = most_tokens(self._parameters, self._like.dtype)
            if batch.total > limit:
                return f"more than {limit} tokens, with which the GPU is the slower one"
        return self._recorder.why_not_now()

    def _drop_if_outdated(self, weights: EncoderWeights) -> None:
        held, premises = self._held, self._premises.now()
        if held is None or held.weights() is not weights or held.premises != premises:
            self._graphs.clear()
            self._seen.clear()
            self._failed.clear()
            self._held = _Held(ref(weights), premises, self._rows_of_tables())

    @property
    def _like(self) -> Tensor:
        return self._spec.embeddings.word.weight

    def _rows_of_tables(self) -> list[int]:
        embeddings = self._spec.embeddings
        tables = (embeddings.word, embeddings.position, embeddings.token_type)
        return [
            weight.shape[0]
            for table in tables
            # To ask a module for its attribute takes five times as long.
            if table is not None and (weight := table._parameters["weight"]) is not None
        ]

    def _came_before(self, key: _Key) -> bool:
        """Recording takes as long as some forwards: what comes once is not worth it."""
        if key in self._seen:
            del self._seen[key]
            return True
        self._seen[key] = None
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return False

    def _graph_of(self, key: _Key, inputs: Inputs, weights: EncoderWeights) -> _Graph | str:
        """The graph of a size, recorded now if this is its second batch, or why there is none."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            return graph
        if key in self._failed:
            return self._failed[key]
        if not self._came_before(key):
            return "the first batch of its size"
        try:
            # What inference mode makes could not be written outside it later.
            with torch.inference_mode(False), torch.no_grad():
                graph = self._graphs[key] = self._record(key, inputs, weights)
        except RecordingFailedError as error:
            reason = self._failed[key] = f"recording failed: {error}"
            return reason
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return graph

    def _replay(self, key: _Key, graph: _Graph, inputs: Inputs) -> Tensor:
        batch, recording = inputs.batch, graph.recording
        with self._recorder.turn():
            graph.static.fill(inputs)
            recording.replay()
            rows = batch.batch_size if key.first_token_alone else batch.total
            # In the caller's mode, so that the result is what it would be without us.
            return recording.output[:rows].clone()

    def _record(self, key: _Key, inputs: Inputs, weights: EncoderWeights) -> _Graph:
        spec, backend = self._spec, self._backend
        static = _StaticInputs(key.bucket, key.has_types, self._like.device)
        static.fill(inputs)

        def forward() -> Tensor:
            hidden = engine.embed(
                spec.embeddings,
                weights.projection,
                backend,
                static.position_ids,
                static.token_type_ids,
                static.input_ids,
                None,
            )
            return engine.encode(
                spec,
                weights,
                backend,
                static.batch,
                static.position_ids,
                hidden,
                None,
                key.first_token_alone,
            )

        reads = [*static.tensors, *self._premises.buffers()]
        recording = self._recorder.record(forward, reads)
        self._counts.count_recorded()
        return _Graph(static, recording)


@dataclass(frozen=True, slots=True)
class _Held:
    """What the graphs are right for: these very weights, and equal premises. They don't keep the
    weights of a model that has others now: it may be long until a graph is asked for again."""

    weights: ref[EncoderWeights]
    premises: tuple
    rows_of_tables: list[int]


@dataclass(frozen=True, slots=True)
class _Key:
    """What decides which kernels are recorded, beside the premises."""

    bucket: Bucket
    has_types: bool
    first_token_alone: bool

    @classmethod
    def of(cls, inputs: Inputs, first_token_alone: bool) -> _Key:
        return cls(Bucket.of(inputs.batch), inputs.token_type_ids is not None, first_token_alone)


class _StaticInputs:
    """The buffers that a recorded forward reads.

    Tokens behind the last sequence belong to none: attention gives zeros for them, and all else
    goes token by token. Their ids are zeros or what an earlier batch left there, in range either
    way. Sequences behind the last one begin and end where it ends.
    """

    def __init__(self, bucket: Bucket, has_types: bool, device: torch.device) -> None:
        def ids() -> Tensor:
            return torch.zeros(bucket.total, dtype=torch.int64, device=device)

        self.input_ids, self.position_ids = ids(), ids()
        self.token_type_ids = ids() if has_types else None
        cu_seqlens = torch.zeros(bucket.batch_size + 1, dtype=torch.int32, device=device)
        # The engine never asks how the batch was padded.
        self.batch = PackedBatch(
            cu_seqlens, bucket.max_seqlen, bucket.total, bucket.batch_size, bucket.max_seqlen, None
        )

    @property
    def tensors(self) -> list[Tensor]:
        given = (self.input_ids, self.position_ids, self.token_type_ids, self.batch.cu_seqlens)
        return [tensor for tensor in given if tensor is not None]

    def fill(self, inputs: Inputs) -> None:
        """Copy a batch of this bucket into the buffers; nothing waits for the device."""
        batch = inputs.batch
        assert inputs.input_ids is not None
        batch.pack_into(self.input_ids, inputs.input_ids)
        if self.token_type_ids is not None and inputs.token_type_ids is not None:
            batch.pack_into(self.token_type_ids, inputs.token_type_ids)
        if inputs.position_ids is None:
            batch.columns_into(self.position_ids)
        else:
            batch.pack_into(self.position_ids, inputs.position_ids)
        cu_seqlens, count = self.batch.cu_seqlens, batch.batch_size + 1
        if count == len(cu_seqlens):
            cu_seqlens.copy_(batch.cu_seqlens)
        else:
            cu_seqlens[:count].copy_(batch.cu_seqlens)
            cu_seqlens[count:].fill_(batch.total)


@dataclass(frozen=True, slots=True)
class _Graph:
    """A recorded forward, and the buffers that a batch is copied into first."""

    static: _StaticInputs
    recording: Recording
