"""What a model's folder says about its use: sentence-transformers' own files.

``modules.json`` lists the modules behind the transformer (pooling, normalisation),
``sentence_bert_config.json`` the longest input, ``config_sentence_transformers.json`` the prompts.
A folder without ``modules.json`` gets mean pooling, as it does in sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from encoder_fast.errors import ModelFilesError
from encoder_fast.ops.pool import MODES
from encoder_fast.patching.sentence import POOLING_FLAGS
from encoder_fast.text.files import inside, join, read_list, read_object
from encoder_fast.text.keys import (
    ACTIVATIONS,
    MODEL_OPTIONS,
    MODULE,
    MODULES,
    TOKENIZER_OPTIONS,
    WHOLE,
    check,
    passed_on,
)
from encoder_fast.text.tokenising import UNLIMITED

_WHOLE_FILE = "config_sentence_transformers.json"

# What a model that is loaded already has of that file.
_LIVE_KEYS = {
    "SentenceTransformer": (
        *("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim"),
    ),
    "CrossEncoder": ("prompts", "default_prompt_name"),
}

# What the file about the transformer was called, at one time by the model's architecture.
_TRANSFORMER_FILES = [
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]


@dataclass(frozen=True, slots=True)
class Settings:
    """How the authors of a model mean it to be used.

    Attributes:
        kind: which of sentence-transformers' models they are for: ``SentenceTransformer`` or
            ``CrossEncoder``. The prompts are for that one's method alone.
        pooling: ``cls``, ``mean`` or ``max``.
        normalize: vectors are divided by their length.
        max_length: the longest input in tokens, special tokens counted; ``None`` if nothing says.
        lower_case: texts are made lower case first.
        prompts: the texts put in front of an input, by name.
        default_prompt: the name of the prompt that is used where none is asked for.
        truncate_dim: how many of a vector's values are kept.
        similarity: ``cosine`` or ``dot``.
        activation: from a cross-encoder's logits to its scores; ``None`` if nothing says.
        subfolder: where in the folder the transformer is.
        model_options, tokenizer_options: what is given to ``from_pretrained``.
    """

    kind: str = "SentenceTransformer"
    pooling: str = "mean"
    normalize: bool = False
    max_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    truncate_dim: int | None = None
    similarity: str = "cosine"
    activation: Callable[[Tensor], Tensor] | None = None
    subfolder: str = ""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """One module: its kind, what its file says, and that file's name in errors."""

    kind: str
    config: Mapping[str, Any]
    label: str


def read_settings(path: str, pooling: str | None) -> Settings:
    """Read the folder or hub repository ``path``; ``pooling`` overrules what it says.

    Raises:
        ModelFilesError: a file is damaged, or has what :class:`TextEncoder` does not have.
    """
    entries = _read_modules(path)
    if entries is None:
        # sentence-transformers too reads its other files only where this one is
        return Settings(pooling=pooling or "mean")
    _check_modules([entry["type"] for entry in entries], path)
    parts = []
    for entry in entries:
        kind = entry["type"].rsplit(".", 1)[-1]
        names = _TRANSFORMER_FILES if kind == "Transformer" else ("config.json",)
        files = [join(entry["path"], name) for name in names]
        found = ((file, read_object(path, file)) for file in files)
        file, config = next(((file, config) for file, config in found if config), (files[0], {}))
        if not config and kind == "Pooling" and pooling is None:
            raise ModelFilesError(
                f"{file} of {path} is missing or empty, and it says how to pool: choose by pooling="
            )
        parts.append(Part(kind, config, f"{file} of {path}"))
    whole = read_object(path, _WHOLE_FILE) or {}
    settings = _settings(parts, whole, f"{_WHOLE_FILE} of {path}", pooling, path)
    transformer = parts[0].config
    return replace(
        settings,
        subfolder=entries[0]["path"],
        model_options=passed_on(_either(transformer, "model_args"), MODEL_OPTIONS),
        tokenizer_options=passed_on(_either(transformer, "tokenizer_args"), TOKENIZER_OPTIONS),
    )


def transformer_folder(path: str) -> str:
    """The subfolder of ``path`` that has the transformer; empty where it is at the top."""
    entries = _read_modules(path)
    return entries[0]["path"] if entries else ""


def live_settings(model: Any, kind: str, pooling: str | None) -> Settings:
    """The settings of a model that is loaded already, of the kind that :func:`model_kind` says."""
    label = f"this {type(model).__name__}"
    children = list(model.children())
    # Before version 6 a CrossEncoder has no modules: its only child is the model.
    if kind == "CrossEncoder" and not hasattr(model, "_first_module"):
        parts = [Part("Transformer", {}, label)]
    else:
        types = [f"{type(child).__module__}.{type(child).__name__}" for child in children]
        _check_modules(types, label)
        parts = [
            Part(type(child).__name__, _live_config(child), f"{type(child).__name__} of {label}")
            for child in children
        ]
    whole = {key: getattr(model, key, None) for key in _LIVE_KEYS[kind]} | {"model_type": kind}
    settings = _settings(parts, whole, label, pooling, label)
    names = ("max_seq_length", "max_length")
    limit = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if limit is not None and limit > UNLIMITED:
        limit = None
    return replace(
        settings,
        max_length=_call_length(parts[0].config) or limit,
        lower_case=bool(getattr(children[0], "do_lower_case", False)),
        activation=_live_activation(model) if kind == "CrossEncoder" else None,
    )


def model_kind(model: Any) -> str | None:
    """Which of sentence-transformers' models this is, or a subclass of; ``None`` for others.

    Raises:
        ModelFilesError: one that :class:`TextEncoder` can't stand in for.
    """
    for cls in type(model).__mro__:
        if cls.__module__.startswith("sentence_transformers."):
            if cls.__name__ in _LIVE_KEYS:
                return cls.__name__
            if cls.__name__ in ("SparseEncoder", "MultiVectorEncoder"):
                raise ModelFilesError(
                    f"a {cls.__name__} does not embed texts as TextEncoder does; patch() takes it"
                )
    return None


def longest_input(model: nn.Module, tokenizer_limit: int | None, settings: Settings) -> int:
    """The longest input of a model in tokens: what its settings, tokenizer and positions allow.

    Raises:
        ValueError: nothing limits it.
    """
    limits = [settings.max_length or tokenizer_limit, positions(model)]
    known = [limit for limit in limits if limit is not None]
    if not known:
        raise ValueError("neither the tokenizer nor the model says how long an input may be")
    return min(known)


def positions(model: nn.Module) -> int | None:
    """How many positions a model has; ``None`` where nothing bounds them."""
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count positions from padding_idx + 1
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    return limit if isinstance(limit, int) and limit > 0 else None


def _settings(
    parts: list[Part], whole: Mapping[str, Any], file: str, pooling: str | None, label: str
) -> Settings:
    """What checked modules and the file about all of them come to."""
    for part in parts:
        check(part.config, MODULES[part.kind], part.label)
    kind = whole.get("model_type", "SentenceTransformer")
    if not isinstance(kind, str) or kind not in WHOLE:
        raise ModelFilesError(
            f"{file} has model_type = {kind!r}; TextEncoder has {', '.join(WHOLE)}"
        )
    check(whole, WHOLE[kind], file)
    kinds = [part.kind for part in parts]
    if kind == "CrossEncoder" and kinds != ["Transformer"]:
        raise ModelFilesError(
            f"{label} is a CrossEncoder of {', '.join(kinds)}; TextEncoder has those of one "
            "Transformer"
        )
    by_model = [_pooling(part) for part in parts if part.kind == "Pooling" and pooling is None]
    transformer = parts[0].config
    tokenizer = _either(transformer, "tokenizer_args") or {}
    prompts = {name: text or "" for name, text in (whole.get("prompts") or {}).items()}
    default = whole.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ModelFilesError(f"{file} has the default_prompt_name {default!r} and no such prompt")
    activation = whole.get("activation_fn")
    return Settings(
        kind=kind,
        pooling=pooling or (by_model[0] if by_model else "mean"),
        normalize="Normalize" in kinds,
        # the tokenizer's call overrules its own limit, and that overrules this module's
        max_length=_call_length(transformer)
        or tokenizer.get("model_max_length")
        or transformer.get("max_seq_length"),
        lower_case=bool(transformer.get("do_lower_case")),
        prompts=prompts,
        default_prompt=default,
        truncate_dim=whole.get("truncate_dim"),
        similarity=whole.get("similarity_fn_name") or "cosine",
        activation=None if activation is None else ACTIVATIONS[activation],
    )


def _read_modules(path: str) -> list[dict[str, Any]] | None:
    """The checked entries of ``modules.json``; ``None`` where there is no such file."""
    entries = read_list(path, "modules.json")
    if entries is None:
        return None
    label = f"modules.json of {path}"
    if not entries:
        raise ModelFilesError(f"{label} names no module")
    for entry in entries:
        check(entry, MODULE, label)
        for key in ("path", "type"):
            if key not in entry:
                raise ModelFilesError(f"a module in {label} has no {key!r}")
        inside(entry["path"], f"a module's path in {label}")
    names = [str(entry.get("name", number)) for number, entry in enumerate(entries)]
    if len(set(names)) < len(names):
        # where sentence-transformers keeps the last alone
        raise ModelFilesError(f"{label} has two modules of one name")
    return entries


def _check_modules(types: list[str], path: str) -> None:
    """Raise unless the modules are a transformer, at most one pooling, and normalisation.

    They are known by name, and none is imported: what a folder calls a type never runs.
    """
    names = [kind.rsplit(".", 1)[-1] for kind in types]
    for kind, name in zip(types, names, strict=True):
        if not kind.startswith("sentence_transformers."):
            raise ModelFilesError(
                f"{path} has a module of its own, {kind}, which TextEncoder can't run"
            )
        if name not in MODULES:
            raise ModelFilesError(
                f"{path} has a module {name}; TextEncoder has {', '.join(MODULES)}"
            )
    order = [name for name in names if name != "Normalize"]
    pooled_at = names.index("Pooling") if "Pooling" in names else len(names)
    if (
        order not in (["Transformer"], ["Transformer", "Pooling"])
        or "Normalize" in names[:pooled_at]
    ):
        raise ModelFilesError(
            f"{path} has the modules {', '.join(names)}; TextEncoder has one Transformer, one "
            "Pooling behind it, and Normalize behind that"
        )


def _either(transformer: Mapping[str, Any], old: str) -> Mapping[str, Any] | None:
    """Options under their old name or, where that is missing, their new one."""
    new = {"model_args": "model_kwargs", "tokenizer_args": "processor_kwargs"}[old]
    return transformer.get(old, transformer.get(new))


def _call_length(transformer: Mapping[str, Any]) -> int | None:
    """The longest input that the module asks of its tokenizer in each call."""
    parts = transformer.get("processing_kwargs") or {}
    call = {**(parts.get("text") or {}), **(parts.get("common") or {})}
    return call.get("max_length")


def _pooling(part: Part) -> str:
    mode = part.config.get("pooling_mode")
    if mode is None:
        mode = [name for flag, name in POOLING_FLAGS.items() if part.config.get(flag)] or "mean"
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in MODES:
        raise ModelFilesError(
            f"{part.label} pools by {' and '.join(modes)}; TextEncoder has {', '.join(MODES)}: "
            "choose one by pooling="
        )
    return modes[0]


def _live_config(module: Any) -> dict[str, Any]:
    config: dict[str, Any] = getattr(module, "get_config_dict", dict)()
    # the module that is loaded knows it better: it may have been set since
    return {key: value for key, value in config.items() if key != "max_seq_length"}


def _live_activation(model: Any) -> Any:
    names = ("activation_fn", "default_activation_function")
    return next((getattr(model, name) for name in names if hasattr(model, name)), None)
