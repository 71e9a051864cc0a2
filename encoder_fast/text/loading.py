"""From a folder, a hub name or a model that is loaded already to model, tokenizer and settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from encoder_fast.errors import ModelFilesError
from encoder_fast.ops.pool import MODES
from encoder_fast.text.files import (
    check_files,
    check_tokenizer_files,
    find_file,
    join,
    loading,
    name_damaged_tokenizer,
)
from encoder_fast.text.live import encoder_in
from encoder_fast.text.settings import Settings, live_settings, model_kind, read_settings

_HEADS = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}


def load(
    path_or_model: str | os.PathLike[str] | nn.Module,
    tokenizer: Any,
    pooling: str | None,
    device: str | torch.device,
    dtype: str | torch.dtype,
) -> tuple[nn.Module, Any, Settings]:
    """The model in eval mode where and in what it shall run, its tokenizer, its settings.

    Raises:
        FileNotFoundError: there is no such folder.
        ModelFilesError: a file is damaged, or asks for what is not supported.
        ValueError: no tokenizer, an unknown dtype or pooling.
    """
    if pooling is not None and pooling not in MODES:
        raise ValueError(f"pooling must be one of {MODES}, got {pooling!r}")
    wanted = None if dtype == "auto" else _dtype(dtype)
    if isinstance(path_or_model, nn.Module):
        model, own, settings = _take_apart(path_or_model, pooling)
        if tokenizer is None:
            tokenizer = own
    else:
        path = os.fspath(path_or_model)
        _check_path(path)
        settings = read_settings(path, pooling)
        check_files(path, settings.subfolder)
        model = _load_model(path, settings, wanted)
        if tokenizer is None:
            tokenizer = load_tokenizer(path, settings.subfolder, settings.tokenizer_options)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(os.fspath(tokenizer), "")
    if tokenizer is None:
        raise ValueError(f"a {type(model).__name__} comes without a tokenizer: give tokenizer=")
    model.to(device=None if device == "auto" else device, dtype=wanted)
    return model.eval(), tokenizer, settings


def _take_apart(model: Any, pooling: str | None) -> tuple[nn.Module, Any, Settings]:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model, None, Settings(pooling=pooling or "mean")
    kind = model_kind(model)
    encoder = encoder_in(model, kind)
    if kind is None:
        return encoder, None, Settings(pooling=pooling or "mean")
    return encoder, getattr(model, "tokenizer", None), live_settings(model, kind, pooling)


def _check_path(path: str) -> None:
    looks_local = path.startswith((".", "~", os.sep)) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise FileNotFoundError(f"no such folder: {path}")


def _load_model(path: str, settings: Settings, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    options = {"dtype": "auto", **settings.model_options}
    if "torch_dtype" in options:
        options["dtype"] = options.pop("torch_dtype")
    if dtype is not None:
        options["dtype"] = dtype
    # Both said aloud: left open, transformers asks on the terminal whether code may run, and
    # takes what comes on standard input for the answer.
    safe = {"subfolder": settings.subfolder, "trust_remote_code": False}
    with loading(f"{join(settings.subfolder, 'config.json')} of {path}"):
        config = transformers.AutoConfig.from_pretrained(path, **safe)
    name = (config.architectures or [""])[0]
    auto = next((auto for head, auto in _HEADS.items() if name.endswith(head)), "AutoModel")
    with loading(f"the model of {path}"):
        options |= {**safe, "weights_only": True}
        return getattr(transformers, auto).from_pretrained(path, **options)


def load_tokenizer(path: str, subfolder: str, options: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer of a folder or hub repository.

    Raises:
        ModelFilesError: it has none, or one that can't be used.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    check_tokenizer_files(path, subfolder)
    try:
        # a tokenizer's errors are of any class, tokenizers' own is Exception itself
        tokenizer = AutoTokenizer.from_pretrained(
            path, **(options or {}), subfolder=subfolder, trust_remote_code=False
        )
    except Exception as error:
        name_damaged_tokenizer(path, subfolder)
        # transformers 4 looks for another format, and so for protobuf, where there are no files
        reason = " ".join(str(error).split())
        raise ModelFilesError(f"{path} has no tokenizer that can be loaded: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelFilesError(f"the tokenizer of {path} is a {type(tokenizer).__name__}")
    # Where there are no files, transformers 5 makes a tokenizer without a vocabulary.
    names = tokenizer.vocab_files_names.values() or ("tokenizer_config.json",)
    if all(find_file(path, join(subfolder, name)) is None for name in names):
        raise ModelFilesError(
            f"{path} has no tokenizer that can be loaded: none of {', '.join(names)}"
        )
    return tokenizer


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be 'auto', 'float32', 'float16' or 'bfloat16', got {dtype!r}")
    return found
