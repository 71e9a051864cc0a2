"""Models whose modules read what an encoder returns, for tests of who reads padding."""

from typing import Any

import pytest
import torch
from berts import DEVICE, minilm_path, tiny
from torch import Tensor, nn
from transformers import AutoTokenizer

import encoder_fast

st = pytest.importorskip("sentence_transformers", minversion="6")
from sentence_transformers.base.modules import (  # noqa: E402
    Dense,
    Transformer,
)

TEXTS = ["a cat", "The office opens at nine and closes at five, but on Sundays.", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tiny"))
    tiny("BertForMaskedLM", vocab_size=30522).save_pretrained(path)
    AutoTokenizer.from_pretrained(minilm_path()).save_pretrained(path)
    return path


class Own(nn.Module):
    """A user's own module, which reads every column."""

    def forward(self, features: dict) -> dict:
        features["token_embeddings"] = features["token_embeddings"].cumsum(dim=1)
        return features


def reasons(model: nn.Module) -> str:
    return " ".join(encoder_fast.report(model).fallbacks)


def sequence(folder: str, *behind: nn.Module, **options: object) -> Any:
    return st.SentenceTransformer(modules=[Transformer(folder, **options), *behind], device=DEVICE)


def token_dense() -> Dense:
    return Dense(48, 16, module_input_name="token_embeddings")


def embed(model: Any, folder: str, texts: list[str] = TEXTS) -> Tensor:
    features = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model(dict(features.to(DEVICE)))["sentence_embedding"]


class Mean(nn.Module):
    """A head of the user's own, which takes the mean of all columns."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.seen: list[Tensor] = []

    def forward(self, **call: Tensor) -> Tensor:
        self.seen.append(self.encoder(**call).last_hidden_state)
        return self.seen[-1].mean(dim=1)
