"""The model of a command, loaded without remarks, and a mark of all that it is."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from encoder_fast.cli.errors import UserError, first_line, say

if TYPE_CHECKING:
    from encoder_fast.text import TextEncoder


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What model, and how it runs."""

    model: str
    device: str
    dtype: str
    backend: str
    threads: int | None
    max_tokens_per_batch: int | None
    pooling: str | None = None


def quiet_transformers() -> Any:
    """The package ``transformers``, without progress bars and remarks on checkpoints."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def check_device(device: str) -> None:
    """Raise :class:`UserError` unless PyTorch has that device, or it is ``auto``."""
    import torch

    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {first_line(error)}") from None


@contextmanager
def loading_errors(model: str) -> Iterator[None]:
    """Make a :class:`UserError` of what a model that can't be loaded raises."""
    from encoder_fast.errors import BackendUnavailableError, UnsupportedModelError

    try:
        yield
    except (UnsupportedModelError, BackendUnavailableError, UserError):
        raise
    except Exception as error:
        # a damaged file raises whatever its reader has, safetensors an exception of its own
        hint = ""
        if not os.path.exists(model):
            hint = "no such folder here, and as a name on the hub: "
        elif not os.path.exists(os.path.join(model, "config.json")):
            hint = "a folder with a config.json is needed: "
        raise UserError(f"--model {model}: {hint}{first_line(error)}") from error


def load_encoder(choice: ModelChoice) -> TextEncoder:
    """The model with its tokenizer.

    Raises:
        UserError: it can't be loaded.
    """
    import torch

    from encoder_fast.text import TextEncoder

    quiet_transformers()
    if choice.threads is not None:
        torch.set_num_threads(choice.threads)
    check_device(choice.device)
    with warnings.catch_warnings(record=True) as said, loading_errors(choice.model):
        warnings.simplefilter("always", UserWarning)
        encoder = TextEncoder.from_pretrained(
            choice.model,
            pooling=choice.pooling,
            device=choice.device,
            dtype=choice.dtype,
            backend=choice.backend,
            max_tokens_per_batch=choice.max_tokens_per_batch,
        )
    for one in said:
        # other packages' remarks are no news to who runs a command
        if "runs its own padded forward" in str(one.message):
            say(f"note: {one.message}")
    return encoder


def fingerprint(encoder: TextEncoder) -> str:
    """SHA-256 of a model's weights, configuration, tokenizer and settings."""
    import torch

    digest = hashlib.sha256(repr(encoder.settings).encode())
    config = {k: v for k, v in encoder.model.config.to_dict().items() if k != "_name_or_path"}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    tokenizer = encoder.tokenizer
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    for name, tensor in sorted(encoder.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
