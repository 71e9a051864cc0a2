"""Tiny random models under the names that foreign suites ask the Hub for.

The suites run offline. A test that asserts what a real model says fails with these, patched or not;
the others run.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
import transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'"
# RoBERTa's positions begin behind its padding id, 1. So all have that.
VOCABULARY = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *LETTERS, *("##" + c for c in LETTERS)]
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 1,
}
REVISION = "0" * 40

ENCODERS = "Albert Bert Deberta DebertaV2 DistilBert Electra MPNet ModernBert Roberta XLMRobertaXL"
CLASSIFIER = "ForSequenceClassification"
TRANSFORMERS = {
    **{f"hf-internal-testing/tiny-random-{name}Model": f"{name}Model" for name in ENCODERS.split()},
    **{
        f"peft-internal-testing/tiny-random-{name}{head}": f"{name}{head}"
        for name in ("Bert", "Roberta", "Deberta", "DebertaV2")
        for head in ("Model", CLASSIFIER)
    },
    "hf-internal-testing/tiny-random-BertLMHeadModel": "BertLMHeadModel",
    "hf-internal-testing/tiny-random-bert": "BertModel",
    "hf-internal-testing/tiny-random-camembert": "CamembertModel",
    "hf-internal-testing/tiny-xlm-roberta": "XLMRobertaModel",
    "distilbert/distilbert-base-uncased": "DistilBertForMaskedLM",
}
# By the class of sentence-transformers that the tests load them with.
SENTENCE_TRANSFORMERS = {
    "SentenceTransformer": {
        "sentence-transformers-testing/stsb-bert-tiny-safetensors": "BertModel",
        "sentence-transformers/paraphrase-distilroberta-base-v1": "RobertaModel",
    },
    "CrossEncoder": {
        "cross-encoder-testing/reranker-bert-tiny-gooaq-bce": f"Bert{CLASSIFIER}",
        "cross-encoder-testing/stsb-distilroberta-base": f"Roberta{CLASSIFIER}",
    },
    "SparseEncoder": {"sparse-encoder-testing/splade-bert-tiny-nq": "BertForMaskedLM"},
}


def make(hub: Path, *, sentences: bool) -> None:
    """Fill a Hub cache; with ``sentences``, also with models of sentence-transformers."""
    for name, kind in TRANSFORMERS.items():
        _save(_snapshot(hub, name), kind)
    for loader, models in SENTENCE_TRANSFORMERS.items() if sentences else ():
        import sentence_transformers

        for name, kind in models.items():
            with tempfile.TemporaryDirectory() as folder:
                _save(Path(folder), kind, **({"num_labels": 1} if loader == "CrossEncoder" else {}))
                model = getattr(sentence_transformers, loader)(folder, device="cpu")
                model.save_pretrained(str(_snapshot(hub, name)))


def _snapshot(hub: Path, name: str) -> Path:
    """Where the cache of huggingface_hub has the files of a repository."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    return snapshot


def _save(folder: Path, kind: str, **changes: int) -> None:
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    cls(cls.config_class(**SIZES, **changes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 510}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
