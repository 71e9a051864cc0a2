"""sentence-transformers: ``encode`` pools the packed tokens, and their states are never padded.

``SentenceTransformer.encode`` reads embeddings of texts and nothing else, unless it is told to. So
where its modules are a transformer and a pooling as they came, the encoder pools what it has
packed, and the pooling takes that; under ``cls`` pooling the last layer computes no other token.
The encoder can't tell who calls it, so ``encode`` is patched too and says so. The model called by
itself gives its token embeddings, as ever.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from encoder_fast.families.origin import is_library_code
from encoder_fast.looks import can_watch
from encoder_fast.ops import pool
from encoder_fast.packing import PackedBatch
from encoder_fast.patching.head import is_watched
from encoder_fast.patching.locate import STATE, original_class
from encoder_fast.patching.memory import Memory
from encoder_fast.patching.own import own_method

_LIBRARY = ("sentence_transformers.",)

# They read the sentence embedding alone, unless they are told another name.
AFTER_POOLING = ("Dense", "Dropout", "LayerNorm", "Normalize")

POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""What older versions have in place of ``pooling_mode``, in the order in which they concatenate."""


@dataclass(slots=True)
class PackedPooling:
    """What one ``encode`` wants of its encoder, in place of the states of all tokens.

    Attributes:
        encoder: the one that is meant.
        modes: of :data:`~encoder_fast.ops.pool.MODES`; their results are concatenated.
        pooled: what the encoder gave last, ``(B, 1, modes · N)``.
    """

    encoder: nn.Module
    modes: tuple[str, ...]
    pooled: Tensor | None = None

    @property
    def first_token_alone(self) -> bool:
        return self.modes == ("cls",)

    def pool(self, hidden: Tensor, batch: PackedBatch, backend: str) -> Tensor:
        """``(total, N)``, or ``(B, N)`` of the first tokens alone, to one state a text in the shape
        of one token's, ``(B, 1, modes · N)``."""
        if self.first_token_alone:
            pooled = hidden
        else:
            hidden, run = batch.without_filler(hidden), pool.operator.run
            parts = [run(hidden, batch.cu_seqlens, mode, backend) for mode in self.modes]
            pooled = torch.cat(parts, dim=1).to(hidden.dtype)
        self.pooled = pooled.unsqueeze(1)
        return self.pooled

    def is_result(self, features: dict[str, Any]) -> bool:
        """Whether these features hold what the encoder has pooled, and not its tokens' states."""
        return self.pooled is not None and features.get("token_embeddings") is self.pooled


_wanted: ContextVar[PackedPooling | None] = ContextVar("packed_pooling", default=None)


def pooling_behind(encoder: nn.Module) -> PackedPooling | None:
    """The pooling that alone reads what this call of ``encoder`` returns, if one does."""
    wanted = _wanted.get()
    return wanted if wanted is not None and wanted.encoder is encoder else None


_encoding: ContextVar[nn.Module | None] = ContextVar("encoding", default=None)


def container_encoding() -> nn.Module | None:
    """The ``SentenceTransformer`` or its like that is called by its own ``encode`` or ``predict``,
    which reads embeddings or scores of texts, or the tokens that have a mask of 1."""
    return _encoding.get()


class ContainerState:
    """What a patched ``SentenceTransformer``, or its like, carries. It decides anew in every
    ``encode`` or ``predict``."""

    def __init__(self, original: Any, entry: str) -> None:
        self.original = original
        self.entry = entry
        self._memory: Memory[bool] | None = None

    def __copy__(self) -> ContainerState:
        return ContainerState(self.original, self.entry)

    # Under a tracer, who reads what the encoder returns is not what the modules say.
    @torch.compiler.disable
    def attempt(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The library's own ``encode``, as ever."""
        encode = getattr(self.original, self.entry)
        alone = _reads_embeddings_alone(encode, args, kwargs)
        wanted = _wanted.set(self._pipeline(model) if alone else None)
        encoding = _encoding.set(model if alone else None)
        try:
            return encode(model, *args, **kwargs)
        finally:
            _wanted.reset(wanted)
            _encoding.reset(encoding)

    def _pipeline(self, model: Any) -> PackedPooling | None:
        """What to ask of the encoder; nothing where anybody else may see what it returns."""
        memory = self._memory
        if memory is None or not memory.holds(model):
            self._memory = memory = _remember(model) if can_watch() else None
        is_known = None if memory is None else memory.answers.get(None)
        if is_known is None:
            is_known = _is_a_known_pipeline(model)
            if memory is not None:
                memory.answers[None] = is_known
        return _read_pipeline(model) if is_known else None


class PoolingState:
    """What the pooling inside one carries: it takes what the encoder has pooled already."""

    entry = "forward"

    def __init__(self, original: Any) -> None:
        self.original = original

    def attempt(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The features with their embedding; by the library's own code unless it is there."""
        wanted = None if torch.compiler.is_compiling() else _wanted.get()
        features = args[0] if args else None
        if wanted is None or features is None or not wanted.is_result(features):
            return self.original.forward(model, *args, **kwargs)
        features["sentence_embedding"] = features.pop("token_embeddings").squeeze(1)
        return features


_unexpanded: ContextVar[nn.Module | None] = ContextVar("unexpanded", default=None)


def is_expanding(transformer: nn.Module) -> bool:
    """Whether a transformer pads queries with tokens that are scored though none attends to them,
    and has not said that the call it makes has none of these."""
    if not hasattr(type(transformer), "query_expansion") or _unexpanded.get() is transformer:
        return False
    expansion: Any = transformer.query_expansion
    return expansion is not None and not expansion.get("attend")


class TransformerState:
    """What a patched transformer that expands queries carries: documents have no such tokens."""

    entry = "forward"

    def __init__(self, original: Any) -> None:
        self.original = original

    def attempt(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The library's own forward, as ever."""
        forward = self.original.forward
        features = args[0] if args else kwargs.get("features")
        if (
            torch.compiler.is_compiling()
            or not isinstance(features, Mapping)
            or features.get("query_expansion_positions") is not None
        ):
            return forward(model, *args, **kwargs)
        token = _unexpanded.set(model)
        try:
            return forward(model, *args, **kwargs)
        finally:
            _unexpanded.reset(token)


SentenceState = ContainerState | PoolingState | TransformerState


_CONTAINERS = {
    "SentenceTransformer": "encode",
    "SparseEncoder": "encode",
    "MultiVectorEncoder": "encode",
    "CrossEncoder": "predict",
}


def sentence_states(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, SentenceState]]:
    """What there is to patch beside the encoders: each ``SentenceTransformer`` or its like, its
    pooling, and transformers that expand queries."""
    found: list[tuple[nn.Module, SentenceState]] = []
    for module in modules:
        if is_expanding(module):
            found.append((module, TransformerState(original_class(module))))
        for name, entry in _CONTAINERS.items():
            if _is_own(module, name, methods=(entry, "forward")):
                found.append((module, ContainerState(original_class(module), entry)))
        if _is_own(module, "SentenceTransformer", methods=("encode", "forward")):
            parts = list(module.children())
            if len(parts) > 1 and _is_own(parts[1], "Pooling"):
                found.append((parts[1], PoolingState(original_class(parts[1]))))
    return found


def _reads_embeddings_alone(encode: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``encode`` asks for what it gives by default."""
    signature = _signature(encode)
    if "output_value" not in signature.parameters:
        return True
    try:
        given = signature.bind_partial(None, *args, **kwargs).arguments
    except TypeError:  # which the call itself will raise
        return False
    default = signature.parameters["output_value"].default
    return given.get("output_value", default) == default


@functools.lru_cache(maxsize=16)
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _remember(model: nn.Module) -> Memory[bool]:
    """Where it can be kept whether a model is a known pipeline."""
    parts = list(model.children())
    return Memory(model, [], [*parts, *(one for part in parts for one in _unheard_in(part))], [])


def _unheard_in(transformer: Any) -> list[nn.Module]:
    """The encoder in a transformer and its pooler, which runs no more: nobody read what it gave."""
    encoder = getattr(transformer, "auto_model", None)
    if not isinstance(encoder, nn.Module):
        return []
    pooler = getattr(encoder, "pooler", None)
    return [encoder] if pooler is None else [encoder, *pooler.modules()]


def _is_a_known_pipeline(model: Any) -> bool:
    """Whether it is a transformer, a pooling and what goes by its vectors, all as they came."""
    parts: list[Any] = list(model.children())
    if len(parts) < 2:
        return False
    transformer, pooling, *rest = parts
    return (
        _is_untouched(model, "SentenceTransformer", methods=("encode", "forward"))
        and _is_untouched(transformer, "Transformer")
        and _is_untouched(pooling, "Pooling")
        and isinstance(pooling.__dict__.get(STATE), PoolingState)
        and all(_is_untouched(module, *AFTER_POOLING) for module in rest)
        and not any(map(is_watched, _unheard_in(transformer)))
    )


def _read_pipeline(model: Any) -> PackedPooling | None:
    """What to ask of the encoder in a known pipeline, by its settings."""
    transformer, pooling, *rest = model.children()
    modes = pooling_modes(pooling)
    is_readable = (
        _gives_last_hidden_state(transformer)
        and bool(modes)
        and set(modes) <= set(pool.MODES)
        and getattr(pooling, "include_prompt", True)
        and all(
            getattr(module, "module_input_name", "sentence_embedding") == "sentence_embedding"
            for module in rest
        )
    )
    if not is_readable:
        return None
    # Which column is the first of a row that begins with padding has changed with the versions.
    tokenizer = getattr(transformer, "tokenizer", None)
    if "cls" in modes and getattr(tokenizer, "padding_side", None) != "right":
        return None
    return PackedPooling(transformer.auto_model, modes)


def pooling_modes(pooling: Any) -> tuple[str, ...]:
    """The modes of a ``Pooling``, in the order in which it concatenates."""
    mode = getattr(pooling, "pooling_mode", None)
    if mode is None:
        return tuple(mode for flag, mode in POOLING_FLAGS.items() if getattr(pooling, flag, False))
    return (mode,) if isinstance(mode, str) else tuple(mode)


@functools.cache
def pools_first_token() -> bool:
    """Whether ``cls`` takes the first token; older versions took the first column."""
    return int(sys.modules["sentence_transformers"].__version__.split(".")[0]) >= 6


def _gives_last_hidden_state(transformer: Any) -> bool:
    """Whether it calls its model on a text, and takes that of the outputs."""
    ways = getattr(transformer, "modality_config", None)
    if ways is None:  # older versions know no other
        return True
    way = ways.get("text", {})
    outputs = ("last_hidden_state", ("last_hidden_state",))
    return way.get("method") == "forward" and way.get("method_output_name") in outputs


def _is_untouched(module: Any, *names: str, methods: tuple[str, ...] = ("forward",)) -> bool:
    """Whether it is one of the library's own, and nobody looks at what it is given or returns."""
    return (
        _is_own(module, *names, methods=methods)
        and module.__dict__.keys().isdisjoint(method for method in methods if method != "forward")
        and (isinstance(module, nn.Sequential) or own_method(module) is None)
        and not is_watched(module)
        and getattr(module, "_compiled_call_impl", None) is None
    )


def _is_own(module: nn.Module, *names: str, methods: tuple[str, ...] = ("forward",)) -> bool:
    """Whether it is of one of the library's classes; what is on the instance may go again."""
    cls = original_class(module)
    return cls.__name__ in names and all(
        is_library_code(getattr(cls, name, None), _LIBRARY) for name in methods
    )
