"""all-MiniLM-L6-v2 in half of its size, to be carried where nothing can be installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers

from bench.sources import ROOT
from encoder_fast.cli.demo_run import bundled_model

FOLDER = ROOT / ".cache" / "minilm-fp16"
"""Where it is written, and looked for by the tests and by `first_contact`."""

_WEIGHTS = ("*.safetensors", "*.bin", "*.onnx", "*.h5", "*.ot")


def write(folder: Path) -> int:
    """The model with weights in float16, its tokenizer and settings; the bytes of all files."""
    source = bundled_model()
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*_WEIGHTS), dirs_exist_ok=True)
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float16)
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
