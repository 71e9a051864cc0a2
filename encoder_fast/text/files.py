"""The files of a model's folder: found, read, and checked before anything is made of them.

Nobody has vouched for who wrote the folder, so no file in it may name code to run, or a place
outside the folder to read. Links are followed: a hub cache is made of them, no hub hands out any,
and whoever can put one on this disk can put the file there as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from encoder_fast.errors import ModelFilesError
from encoder_fast.text.keys import CONFIG, INNER_CONFIG, TOKENIZER_FILE, Table, check

_REFUSED = {
    "adapter_config.json": "adapters are not loaded from files; merge it into the model, or "
    "load the model and give that",
    # version 4 of transformers runs it when it loads the folder, without being told to trust it
    "custom_generate/generate.py": "code of the folder's own, which never runs",
}
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def join(folder: str, name: str) -> str:
    """The path of a file inside a repository; ``folder`` may be empty."""
    return str(PurePosixPath(folder) / name)


def find_file(path: str, name: str) -> str | None:
    """Where a file of a local folder or hub repository is; ``None`` where there is no such.

    Raises:
        OSError: the hub gave no answer, and so nothing is known of the file.
    """
    from transformers.utils import cached_file

    try:
        return cached_file(path, name)
    except OSError as error:
        if os.path.isdir(path) or _is_known_to_be_missing(path, name, error):
            return None
        raise OSError(f"{name} of {path} can't be fetched: {error}") from error


def _is_known_to_be_missing(path: str, name: str, error: OSError) -> bool:
    from huggingface_hub import constants, file_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cause = error.__cause__
    if cause is None:
        # transformers' own word; a full disk or a broken connection has a number or a class
        return type(error) is OSError and error.errno is None
    if not isinstance(cause, LocalEntryNotFoundError):
        return isinstance(cause, EntryNotFoundError)
    # not in the cache, and no answer: but the hub was not to be asked, or has answered before
    cached = file_download.try_to_load_from_cache(path, name)
    return constants.HF_HUB_OFFLINE or cached is file_download._CACHED_NO_EXIST


def read_object(path: str, name: str, *, twice: bool = False) -> dict[str, Any] | None:
    """The JSON object in a file of ``path``; ``None`` where there is no such file.

    Args:
        twice: a key may be there twice, and the last counts, as it does for transformers.
    """
    found = read_json(path, name, twice=twice)
    if found is not None and not isinstance(found, dict):
        raise ModelFilesError(f"{name} of {path} must be an object, not {_kind(found)}")
    return found


def read_list(path: str, name: str) -> list[dict[str, Any]] | None:
    """The JSON list of objects in a file of ``path``; ``None`` where there is no such file."""
    found = read_json(path, name)
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ModelFilesError(f"{name} of {path} must be a list of objects, not {_kind(found)}")
    return found


def read_json(path: str, name: str, *, twice: bool = False) -> Any:
    """What a JSON file of ``path`` says; ``None`` where there is no such file.

    Raises:
        ModelFilesError: it is no JSON, or says nothing, or one key twice.
    """
    found = find_file(path, name)
    if found is None:
        return None
    try:
        text = Path(found).read_text("utf-8")
        pairs = dict if twice else _object
        content = json.loads(text, object_pairs_hook=pairs, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{name} of {path} is no JSON: {error}") from None
    if content is None:
        raise ModelFilesError(f"{name} of {path} says null")
    return content


def inside(place: Any, what: str) -> str:
    """``place``, a path that a file of a model has for ``what``, if it stays in the folder."""
    if not isinstance(place, str):
        raise ModelFilesError(f"{what} must be a string, not {_kind(place)}")
    # a folder that was written on one system may be read on another
    parts = PureWindowsPath(place)
    leaves = parts.anchor or place.startswith("~") or ".." in parts.parts
    if leaves or "\0" in place or "://" in place:
        raise ModelFilesError(f"{what} is {place!r}, which leaves the model's folder")
    return place


def check_files(path: str, subfolder: str) -> None:
    """Check the files that transformers reads by itself, before it does.

    Raises:
        ModelFilesError: one of them names code, a kernel, or a file outside the folder.
    """
    check_tokenizer_files(path, subfolder)
    for folder in {"", subfolder}:
        for file, why in _REFUSED.items():
            if find_file(path, join(folder, file)) is not None:
                raise ModelFilesError(f"{path} has {join(folder, file)}: {why}")
    name = join(subfolder, "config.json")
    config = read_object(path, name, twice=True)
    if config is None and subfolder:
        raise ModelFilesError(f"{path} has no {name}, though modules.json names its folder")
    _check_config(config or {}, f"{name} of {path}")
    for name in (join(subfolder, index) for index in _INDEXES):
        found = read_object(path, name, twice=True)
        for key in ("metadata", "weight_map"):
            if found is not None and not isinstance(found.get(key), dict):
                raise ModelFilesError(f"{key} in {name} of {path} must be an object")
        for part in (found or {"weight_map": {}})["weight_map"].values():
            inside(part, f"a weight's file in {name} of {path}")


def check_tokenizer_files(path: str, subfolder: str) -> None:
    """The part of :func:`check_files` that is about a tokenizer."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        name = join(subfolder, file)
        config = read_object(path, name, twice=True) or {}
        known = {key: value for key, value in config.items() if key in TOKENIZER_FILE}
        check(known, TOKENIZER_FILE, f"{name} of {path}")
        # Each key of both is an argument of the tokenizer's class, and some classes open what they
        # are given, wherever it is. Many a folder has a path of its author's machine here, which
        # does no harm as long as nothing is there.
        for key, value in config.items():
            for place in _texts(key, value):
                if _is_elsewhere(place, path):
                    raise ModelFilesError(
                        f"{key} in {name} of {path} is {place!r}, which leaves the model's folder"
                    )
    # the tokenizer's class may be named here, and the configuration's own is looked up
    name = join(subfolder, "config.json")
    config = read_object(path, name, twice=True) or {}
    known = {key: config[key] for key in ("model_type", "tokenizer_class") if key in config}
    check(known, CONFIG, f"{name} of {path}")


def name_damaged_tokenizer(path: str, subfolder: str) -> None:
    """Raise with the name of the tokenizer's file that is no JSON object, if there is one."""
    for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"):
        read_object(path, join(subfolder, name), twice=True)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Make one error of the many that transformers has for files that it can't use."""
    try:
        yield
    except (OSError, ModelFilesError, MemoryError):
        raise
    except Exception as error:
        # tokenizers and safetensors have exceptions of their own
        reason = " ".join(str(error).split())
        raise ModelFilesError(
            f"{what} can't be loaded: {type(error).__name__}: {reason}"
        ) from error


def _check_config(config: Mapping[str, Any], label: str) -> None:
    """Look at a configuration and those inside it; keys without a rule are transformers' own."""
    rest: list[tuple[Any, Table]] = [(config, CONFIG)]
    while rest:
        one, table = rest.pop()
        if isinstance(one, dict):
            check({key: value for key, value in one.items() if key in table}, table, label)
            if one.get("transformers_weights") is not None:
                inside(one["transformers_weights"], f"transformers_weights in {label}")
        inner = one.values() if isinstance(one, dict) else one
        rest += [(value, INNER_CONFIG) for value in inner if isinstance(value, dict | list)]


def _texts(key: str, value: Any) -> Iterator[str]:
    """The strings in a value of a tokenizer's file, but for those that are tokens or a template."""
    rest = [] if "_token" in key or key == "chat_template" else [value]
    while rest:
        one = rest.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict | list):
            rest += one.values() if isinstance(one, dict) else one


def _is_elsewhere(file: str, path: str) -> bool:
    if not os.path.exists(file) or os.path.isdir(file):
        return False
    return Path(path).resolve() not in Path(file).resolve().parents


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(
        type(value), f"{value!r:.40}"
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} is there twice")
    return found


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)
