"""What a model's folder says about its use: sentence-transformers' own files.

``modules.json`` lists the modules behind the transformer (pooling, normalisation),
``sentence_bert_config.json`` the longest input, ``config_sentence_transformers.json`` the prompts.
A folder without ``modules.json`` gets mean pooling, as it does in sentence-transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from torch import nn

from encoder_fast.ops.pool import MODES
from encoder_fast.patching.sentence import POOLING_FLAGS

_SIMILARITIES = ("cosine", "dot")

# What the file about the transformer was called, at one time by the model's architecture.
_TRANSFORMER_FILES = [
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]


@dataclass(frozen=True, slots=True)
class Settings:
    """How the authors of a model mean it to be used.

    Attributes:
        pooling: ``cls``, ``mean`` or ``max``.
        normalize: vectors are divided by their length.
        max_length: the longest input in tokens, special tokens counted; ``None`` if nothing says.
        lower_case: texts are made lower case first.
        prompts: the texts put in front of an input, by name.
        default_prompt: the name of the prompt that is used where none is asked for.
        truncate_dim: how many of a vector's values are kept.
        similarity: ``cosine`` or ``dot``.
        subfolder: where in the folder the transformer is.
        model_options, tokenizer_options: what is given to ``from_pretrained``.
    """

    pooling: str = "mean"
    normalize: bool = False
    max_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    truncate_dim: int | None = None
    similarity: str = "cosine"
    subfolder: str = ""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)


def read_settings(path: str, pooling: str | None) -> Settings:
    """Read the folder or hub repository ``path``; ``pooling`` overrules what it says.

    Raises:
        ValueError: it has a module or a pooling that :class:`TextEncoder` does not have.
    """
    modules = _read_json(path, "modules.json")
    if not modules:
        return Settings(pooling=pooling or "mean")
    _check_modules([module["type"] for module in modules], path)
    names = [module["type"].rsplit(".", 1)[-1] for module in modules]
    subfolder = modules[0]["path"]
    transformer = _read_transformer(path, subfolder)
    whole: dict = _read_json(path, "config_sentence_transformers.json") or {}
    if pooling is None and "Pooling" in names:
        folder = modules[names.index("Pooling")]["path"]
        pooling = _read_pooling(_read_json(path, join(folder, "config.json")) or {}, path)
    return Settings(
        pooling=pooling or "mean",
        normalize="Normalize" in names,
        max_length=transformer.get("max_seq_length"),
        lower_case=bool(transformer.get("do_lower_case")),
        prompts={k: v for k, v in whole.get("prompts", {}).items() if v is not None},
        default_prompt=whole.get("default_prompt_name"),
        truncate_dim=whole.get("truncate_dim"),
        similarity=_check_similarity(whole.get("similarity_fn_name"), path),
        subfolder=subfolder,
        model_options=_options(transformer, "model", path),
        tokenizer_options=_options(transformer, "tokenizer", path),
    )


def transformer_folder(path: str) -> str:
    """The subfolder of ``path`` that has the transformer; empty where it is at the top."""
    modules = _read_json(path, "modules.json")
    return modules[0]["path"] if modules else ""


def live_settings(model: Any, pooling: str | None) -> Settings:
    """The settings of a ``SentenceTransformer`` that is loaded already."""
    children = list(model.children())
    names = [type(child).__name__ for child in children]
    label = f"this {type(model).__name__}"
    _check_modules([f"{type(c).__module__}.{type(c).__name__}" for c in children], label)
    if pooling is None and "Pooling" in names:
        pooling = _read_pooling(children[names.index("Pooling")].get_config_dict(), label)
    return Settings(
        pooling=pooling or "mean",
        normalize="Normalize" in names,
        max_length=model.max_seq_length,
        lower_case=bool(getattr(children[0], "do_lower_case", False)),
        prompts={k: v for k, v in model.prompts.items() if v is not None},
        default_prompt=model.default_prompt_name,
        truncate_dim=model.truncate_dim,
        similarity=_check_similarity(model.similarity_fn_name, label),
    )


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
    return limit if limit is not None and limit > 0 else None


def _check_modules(types: list[str], path: str) -> None:
    """Raise unless the modules are a transformer, at most one pooling, and normalisation."""
    names = [kind.rsplit(".", 1)[-1] for kind in types]
    for kind, name in zip(types, names, strict=True):
        if not kind.startswith("sentence_transformers."):
            raise ValueError(f"{path} has a module of its own, {kind}, which TextEncoder can't run")
        if name not in ("Transformer", "Pooling", "Normalize"):
            raise ValueError(
                f"{path} has a module {name}; TextEncoder has Transformer, Pooling and Normalize"
            )
    order = [name for name in names if name != "Normalize"]
    pooled_at = names.index("Pooling") if "Pooling" in names else len(names)
    if (
        order not in (["Transformer"], ["Transformer", "Pooling"])
        or "Normalize" in names[:pooled_at]
    ):
        raise ValueError(
            f"{path} has the modules {', '.join(names)}; TextEncoder has one Transformer, one "
            "Pooling behind it, and Normalize behind that"
        )


def _read_transformer(path: str, subfolder: str) -> dict[str, Any]:
    for name in _TRANSFORMER_FILES:
        found = _read_json(path, join(subfolder, name))
        if found:
            return found
    return {}


def _options(transformer: Mapping[str, Any], of: str, path: str) -> dict[str, Any]:
    """What the file about the transformer wants to be loaded with, under its old or new name."""
    if transformer.get("config_args") or transformer.get("config_kwargs"):
        raise ValueError(f"{path} changes the model's configuration, which TextEncoder can't")
    new = {"model": "model_kwargs", "tokenizer": "processor_kwargs"}[of]
    given = transformer.get(f"{of}_args") or transformer.get(new) or {}
    return {name: value for name, value in given.items() if name != "trust_remote_code"}


def _read_pooling(config: Mapping[str, Any], path: str) -> str:
    mode = config.get("pooling_mode")
    if mode is None:
        mode = [name for flag, name in POOLING_FLAGS.items() if config.get(flag)] or "mean"
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in MODES:
        raise ValueError(
            f"{path} pools by {' and '.join(modes)}; TextEncoder has {', '.join(MODES)}: choose "
            "one by pooling="
        )
    if config.get("include_prompt") is False:
        raise ValueError(f"{path} leaves its prompt out of the pooling, which TextEncoder can't")
    return modes[0]


def _check_similarity(name: str | None, path: str) -> str:
    if name is not None and name not in _SIMILARITIES:
        raise ValueError(f"{path} compares by {name!r}; TextEncoder has {', '.join(_SIMILARITIES)}")
    return name or "cosine"


def join(folder: str, name: str) -> str:
    """The path of a file inside a repository; ``folder`` may be empty."""
    return str(PurePosixPath(folder) / name)


def find_file(path: str, name: str) -> str | None:
    """Where a file of a local folder or hub repository is; ``None`` where there is no such."""
    from transformers.utils import cached_file

    try:
        return cached_file(path, name)
    except OSError:
        return None


def _read_json(path: str, name: str) -> Any:
    found = find_file(path, name)
    if found is None:
        return None
    with open(found, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{name} of {path} is no JSON: {error}") from None
