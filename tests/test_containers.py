"""patch on what holds an encoder: SentenceTransformer, CrossEncoder, transformers pipelines."""

from pathlib import Path

import pytest
import torch
import zoo
from berts import DEVICE, minilm, minilm_path, tiny

import encoder_fast
from encoder_fast.parity import compare

TEXTS = ["Hello world", "A much longer sentence about encoders, and about padding.", "", "x"] * 3


def test_sentence_transformer() -> None:
    st = pytest.importorskip("sentence_transformers")
    model = st.SentenceTransformer(minilm_path(), device=DEVICE)
    before = torch.from_numpy(model.encode(TEXTS))
    after = torch.from_numpy(encoder_fast.patch(model).encode(TEXTS))
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)
    report = encoder_fast.report(model)
    assert report.fast_calls > 0
    assert report.fallbacks == {}
    assert torch.equal(torch.from_numpy(encoder_fast.unpatch(model).encode(TEXTS)), before)


def test_sentence_transformer_over_mpnet(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    tokenizer.pad_token = "[unused0]"  # id 1, which MPNet's positions skip
    tokenizer.save_pretrained(tmp_path)
    zoo.build("mpnet", vocab_size=30522, max_position_embeddings=64).save_pretrained(tmp_path)

    def load() -> torch.nn.Module:
        return st.SentenceTransformer(str(tmp_path), device=DEVICE)  # with mean pooling

    model = load()
    before = model.encode(TEXTS, convert_to_tensor=True)
    after = encoder_fast.patch(model).encode(TEXTS, convert_to_tensor=True)
    exact = load().double().encode(TEXTS, convert_to_tensor=True)
    assert exact.dtype == torch.float64
    row = compare("embeddings", after, before, exact)
    assert row.ok, row
    report = encoder_fast.report(model)
    assert report.fast_calls > 0
    assert report.fallbacks == {}


def test_cross_encoder(tmp_path: object) -> None:
    st = pytest.importorskip("sentence_transformers")
    from transformers import AutoTokenizer

    tiny(
        "BertForSequenceClassification",
        vocab_size=30522,
        max_position_embeddings=512,
        num_labels=1,
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(minilm_path()).save_pretrained(tmp_path)
    model = st.CrossEncoder(str(tmp_path), device=DEVICE)
    pairs = [("a question", "an answer of some length"), ("x", "y")] * 3
    before = torch.from_numpy(model.predict(pairs))
    after = torch.from_numpy(encoder_fast.patch(model).predict(pairs))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    report = encoder_fast.report(model)
    assert report.fast_calls > 0
    assert report.fallbacks == {}


def test_pipeline() -> None:
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    pipe = pipeline("feature-extraction", model=minilm(), tokenizer=tokenizer, device=DEVICE)
    before = pipe(TEXTS[:2])
    assert encoder_fast.patch(pipe) is pipe
    after = pipe(TEXTS[:2])
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=2e-5)
    assert encoder_fast.report(pipe).fallbacks == {}
