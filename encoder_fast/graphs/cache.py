"""The graphs of one patched encoder, by the sizes that they are for.

A graph covers the embeddings and the layers, from packed ids to the packed last hidden state. It
reads static buffers, into which each batch is copied, with what fills up the bucket behind it; the
real rows of its output are copied out. What derives from weights alone (the stacked Q, K and V,
DeBERTa's tables) is recorded too, so that a replay computes it from the weights as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from encoder_fast import engine
from encoder_fast.graphs.bucket import Bucket, linear_parameters, most_tokens
from encoder_fast.graphs.counts import GraphCounts
from encoder_fast.graphs.premises import Premises
from encoder_fast.graphs.recorder import Recorder, Recording, RecordingFailedError
from encoder_fast.packing import PackedBatch
from encoder_fast.spec import EncoderSpec
from encoder_fast.weights import WeightCache

MOST_GRAPHS = 64
"""Beyond these the one that was not used for the longest time goes."""

# Sizes that came once are remembered up to so many.
_MOST_SEEN = 1024


@dataclass(frozen=True, slots=True)
class PackedInputs:
    """What a forward reads beside weights.

    Attributes:
        batch: how the tokens are packed.
        input_ids: integers ``(total,)``; ``None`` where embeddings came instead.
        token_type_ids: integers ``(total,)``; ``None`` means zeros.
        position_ids: integers ``(total,)``.
    """

    batch: PackedBatch
    input_ids: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor


class GraphCache:
    """Graphs of one encoder on one device. Safe to share between threads, which take turns."""

    def __init__(
        self,
        spec: EncoderSpec,
        backend: str,
        weights: WeightCache,
        recorder: Recorder,
        counts: GraphCounts,
    ) -> None:
        """
        Raises:
            UnsupportedModelError: the model can't be recorded.
        """
        self._spec = spec
        self._backend = backend
        self._weights = weights
        self._recorder = recorder
        self._counts = counts
        self._premises = Premises(spec, weights)
        self._parameters = linear_parameters(spec)
        self._held: tuple | None = None
        self._graphs: OrderedDict[_Key, _Graph] = OrderedDict()
        self._seen: OrderedDict[_Key, None] = OrderedDict()
        # Sizes that could not be recorded and why. To try again would take longer each time than
        # the forward does.
        self._failed: dict[_Key, str] = {}
        self._lock = Lock()

    def run(
        self, inputs: PackedInputs, *, first_token_alone: bool, every_state: bool
    ) -> Tensor | None:
        """The last hidden state as :func:`engine.encode` gives it, or ``None`` where this call has
        to run without a graph, which is counted with its reason.

        Args:
            every_state: the hidden states of all layers are wanted.

        Raises:
            NotFastError: the weights are such that the engine can't run at all.
        """
        reason = self._why_not(inputs, every_state)
        if reason is None:
            batch = inputs.batch
            has_types = inputs.token_type_ids is not None
            key = _Key(Bucket.of(batch), has_types, first_token_alone)
            with self._lock:
                self._drop_if_outdated()
                found = self._graph_of(key, inputs)
                if isinstance(found, _Graph):
                    result = self._replay(found, inputs, first_token_alone)
                    self._counts.count_replayed()
                    return result
            reason = found
        self._counts.count_without(reason)
        return None

    def _why_not(self, inputs: PackedInputs, every_state: bool) -> str | None:
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
        limit = most_tokens(self._parameters, self._spec.embeddings.word.weight.dtype)
        if batch.total > limit:
            return f"more than {limit} tokens, with which the GPU is the slower one"
        return self._recorder.why_not_now()

    def _drop_if_outdated(self) -> None:
        now = self._premises.now()
        if now != self._held:
            self._graphs.clear()
            self._seen.clear()
            self._failed.clear()
            self._held = now

    def _came_before(self, key: _Key) -> bool:
        """Recording takes as long as some forwards: what comes once is not worth it."""
        if key in self._seen:
            del self._seen[key]
            return True
        self._seen[key] = None
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return False

    def _graph_of(self, key: _Key, inputs: PackedInputs) -> _Graph | str:
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
                graph = self._graphs[key] = self._record(key, inputs)
        except RecordingFailedError as error:
            reason = self._failed[key] = f"recording failed: {error}"
            return reason
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return graph

    def _replay(self, graph: _Graph, inputs: PackedInputs, first_token_alone: bool) -> Tensor:
        batch, recording = inputs.batch, graph.recording
        with self._recorder.turn():
            graph.static.fill(inputs)
            recording.replay()
            rows = batch.batch_size if first_token_alone else batch.total
            # In the caller's mode, so that the result is what it would be without us.
            return recording.output[:rows].clone()

    def _record(self, key: _Key, inputs: PackedInputs) -> _Graph:
        spec, backend = self._spec, self._backend
        like = spec.embeddings.word.weight
        # Weights that can't run are found out here, and where no buffers fit them those are made,
        # in memory that is not the recorder's.
        self._weights.rewritten(like)
        static = _StaticInputs(key.bucket, key.has_types, like.device)
        static.fill(inputs)

        def forward() -> Tensor:
            weights = self._weights.rewritten(like)
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

        recording = self._recorder.record(forward, static.tensors)
        self._counts.count_recorded()
        return _Graph(static, recording, self._weights.buffers)


@dataclass(frozen=True, slots=True)
class _Key:
    """What decides which kernels are recorded, beside the premises."""

    bucket: Bucket
    has_types: bool
    first_token_alone: bool


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

    def fill(self, inputs: PackedInputs) -> None:
        """Copy a batch of this bucket into the buffers; nothing waits for the device."""
        batch = inputs.batch
        for buffer, given in (
            (self.input_ids, inputs.input_ids),
            (self.position_ids, inputs.position_ids),
            (self.token_type_ids, inputs.token_type_ids),
        ):
            if buffer is not None and given is not None:
                buffer[: batch.total].copy_(given)
        cu_seqlens = self.batch.cu_seqlens
        cu_seqlens[: batch.batch_size + 1].copy_(batch.cu_seqlens)
        cu_seqlens[batch.batch_size + 1 :].fill_(batch.total)


@dataclass(frozen=True, slots=True)
class _Graph:
    """A recorded forward, and all that it reads and writes beside the model's own weights."""

    static: _StaticInputs
    recording: Recording
    weight_buffers: object
