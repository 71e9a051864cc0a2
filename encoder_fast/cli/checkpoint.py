"""A model on disk or on the hub, loaded as often and in as many ways as a command needs it."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import encoder_fast
from encoder_fast.cli.errors import UserError, first_line
from encoder_fast.cli.loading import check_device, quiet_transformers
from encoder_fast.cli.measuring import Contestant
from encoder_fast.environment import Info
from encoder_fast.text.files import check_files
from encoder_fast.text.loading import load_tokenizer
from encoder_fast.text.settings import Settings, longest_input, transformer_folder


class Checkpoint:
    """A checkpoint with its tokenizer.

    Args:
        path: a folder or hub name, of sentence-transformers or of plain transformers.
        option: what the path is called in errors.
        whole: with the head that it was saved with, not the bare encoder.
        device: where models are loaded to.
        seed: which passages texts are made of.

    Raises:
        UserError: nothing can be loaded from there.
    """

    def __init__(
        self, path: str, option: str, *, whole: bool = False, device: str = "cpu", seed: int = 0
    ) -> None:
        check_device(device)
        self.path = path
        self.device = device
        self._named = f"{option}{path}"
        self._transformers = quiet_transformers()
        self._random = random.Random(seed)
        self.passages = read_passages()
        try:
            subfolder = transformer_folder(path)
            check_files(path, subfolder)
            self._folder = {"subfolder": subfolder, "trust_remote_code": False}
            config = self._transformers.AutoConfig.from_pretrained(path, **self._folder)
            self.tokenizer = load_tokenizer(path, subfolder)
        except Exception as error:
            raise self._wrong("no model with a tokenizer", error) from error
        name = (getattr(config, "architectures", None) or [""])[0]
        kind = getattr(self._transformers, name, None) if whole else None
        # a folder may call anything of transformers its architecture
        has_head = isinstance(kind, type) and issubclass(kind, self._transformers.PreTrainedModel)
        self._class = getattr(self._transformers, name if has_head else "AutoModel")
        self.head = name if has_head else ""

    def load(self, dtype: torch.dtype, attention: str) -> Any:
        """The model in eval mode.

        Raises:
            UserError: its files are damaged or missing.
        """
        try:
            model = self._class.from_pretrained(
                self.path, dtype=dtype, attn_implementation=attention, **self._folder
            )
        except Exception as error:
            # damaged weights raise whatever their reader has
            raise self._wrong("no model", error) from error
        return model.eval().to(self.device)

    def contestant(self, one: Contestant) -> Any:
        """The model as a contestant runs it."""
        model = self.load(one.dtype, one.attention)
        if one.is_patched:
            return encoder_fast.patch(model, strict=True)
        return torch.compile(model, dynamic=True) if one.is_compiled else model

    def longest(self, model: Any, wanted: int) -> int:
        """``wanted`` tokens, or what the model takes."""
        limit = self.tokenizer.model_max_length
        return min(wanted, longest_input(model, limit, Settings()))

    def batch(self, lengths: Sequence[int], texts: Sequence[str] = ()) -> dict[str, Tensor]:
        """Texts, by default passages joined, cut to at most these many tokens, right-padded."""
        rows = []
        for number, length in enumerate(lengths):
            words = [texts[number]] if texts else []
            # a word is a token or more, so these are enough
            while not texts and len(words) < length:
                words += self._random.choice(self.passages).split()
            rows.append(self.tokenizer(" ".join(words), truncation=True, max_length=length))
        self.tokenizer.padding_side = "right"
        return dict(self.tokenizer.pad(rows, return_tensors="pt").to(self.device))

    def _wrong(self, what: str, error: Exception) -> UserError:
        # os.path's answer to a name that is too long is no, pathlib's an exception
        if os.path.isdir(self.path) and not any(Path(self.path).rglob("config.json")):
            return UserError(f"no model in {self._named}: a folder with a config.json is needed")
        if not os.path.exists(self.path) and self.path.startswith((".", "/", "~")):
            return UserError(f"{self._named}: no such folder")
        return UserError(f"{what} in {self._named}: {first_line(error)}")


def read_passages() -> list[str]:
    text = resources.files("encoder_fast.cli").joinpath("demo_passages.txt").read_text("utf-8")
    return text.splitlines()


def describe(model: Any) -> str:
    """A model's class and size, in a few words."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{type(model).__name__}, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{parameters / 1e6:.1f} M parameters"
    )


def default_device(info: Info) -> str:
    """The GPU if encoder_fast can use it."""
    return "cuda" if info.devices and info.backends["triton"] == "available" else "cpu"


def processor(device: str, info: Info) -> str:
    """The GPU's name; or the processor's as Linux has it, elsewhere its architecture."""
    if device.startswith("cuda"):
        return info.devices[0]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
