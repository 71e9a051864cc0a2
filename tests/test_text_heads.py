"""Labels, entities, rankings and tokens, for texts of any length."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from berts import DEVICE, minilm, minilm_path, tiny
from torch import nn

from encoder_fast import TextEncoder, report
from encoder_fast.parity import compare
from encoder_fast.text.rerank import Ranked
from encoder_fast.text.tokenising import Row

pytest.importorskip("sentence_transformers")
from sentence_transformers import CrossEncoder

TEXTS = [
    "Ada Lovelace wrote to Charles Babbage from London.",
    "",
    "Nothing to see; the Rhine, however, flows through Basel and Köln.",
    "one",
]

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "ORG"]


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(minilm_path())


def headed(head: str, labels: list[str], **changes: object) -> nn.Module:
    """A tiny random model with a head, for MiniLM's tokenizer and inputs of 48 tokens."""
    names = dict(enumerate(labels))
    numbers = {label: number for number, label in names.items()}
    return tiny(
        head,
        vocab_size=30522,
        max_position_embeddings=48,
        id2label=names,
        label2id=numbers,
        **changes,
    )


def exact_logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.inference_mode():
        logits = model.double()(**inputs.to(DEVICE)).logits
        model.float()
    return logits.cpu()


@pytest.mark.parametrize("many", [False, True], ids=["one-label", "many-labels"])
def test_classify(tokenizer: transformers.PreTrainedTokenizerBase, many: bool) -> None:
    kind = "multi_label_classification" if many else "single_label_classification"
    labels = ["angry", "calm", "glad"]
    model = headed("BertForSequenceClassification", labels, problem_type=kind)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    exact = exact_logits(model, inputs)
    with torch.inference_mode():
        original = model(**inputs.to(DEVICE)).logits.cpu()
    read = torch.sigmoid if many else (lambda logits: torch.softmax(logits, dim=-1))
    ours = TextEncoder.from_pretrained(model, tokenizer)
    found = ours.classify(TEXTS)
    probabilities = torch.tensor([list(one.probabilities.values()) for one in found])
    row = compare("probabilities", probabilities, read(original), read(exact))
    assert row.ok, row
    for one, values in zip(found, read(exact), strict=True):
        assert list(one.probabilities) == labels
        assert one.label == labels[int(values.argmax())]
        assert one.probability == one.probabilities[one.label]
        if many:
            expected = [label for label, p in zip(labels, values, strict=True) if p >= 0.5]
            assert list(one.labels) == expected
        else:
            assert one.labels == (one.label,)
            assert sum(one.probabilities.values()) == pytest.approx(1)
    assert ours.classify("one").label == found[3].label
    assert report(model).fallbacks == {}
    assert ours.report().padded_batches == 0


def test_classify_a_long_text(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    model = headed("BertForSequenceClassification", ["no", "yes"])
    ours = TextEncoder.from_pretrained(model, tokenizer)
    text = "word and word again " * 40
    with pytest.warns(UserWarning, match="1 of 1 texts were longer than 48 tokens"):
        cut = ours.classify(text)
    whole = ours.classify(text, long_text="chunk")
    assert whole.probabilities != cut.probabilities
    # the same words all over: all windows but for their borders say the same
    assert whole.probabilities["yes"] == pytest.approx(cut.probabilities["yes"], abs=0.2)


@pytest.mark.parametrize("strategy", ["first", "average"])
def test_tag_as_transformers_does(
    tokenizer: transformers.PreTrainedTokenizerBase, strategy: str
) -> None:
    """``first``, the default, and another: transformers' pipeline is the reference."""
    model = headed("BertForTokenClassification", LABELS, seed=3)
    pipe = transformers.pipeline(
        "token-classification", model, tokenizer=tokenizer, aggregation_strategy=strategy
    )
    texts = [text for text in TEXTS if text]
    expected = [pipe(text) for text in texts]
    assert sum(len(entities) for entities in expected) > 8
    options = {} if strategy == "first" else {"aggregation_strategy": strategy}
    found = TextEncoder.from_pretrained(model, tokenizer).tag(texts, **options)
    for text, ours, theirs in zip(texts, found, expected, strict=True):
        assert [(e.label, e.start, e.stop) for e in ours] == [
            (e["entity_group"], e["start"], e["end"]) for e in theirs
        ]
        assert [e.probability for e in ours] == pytest.approx(
            [e["score"] for e in theirs], abs=1e-5
        )
        assert all(e.text == text[e.start : e.stop] for e in ours)
    assert report(model).fallbacks == {}


def by_word(tokenizer: transformers.PreTrainedTokenizerBase, labels: dict[str, str]) -> object:
    """A head that knows its labels by heart: scores of each token by its id."""
    numbers = {tokenizer.convert_tokens_to_ids(word): label for word, label in labels.items()}

    def scores(rows: list[Row]) -> list[torch.Tensor]:
        picked = [
            torch.tensor([LABELS.index(numbers.get(int(i), "O")) for i in row.ids]) for row in rows
        ]
        return [nn.functional.one_hot(p, len(LABELS)).float() * 20 for p in picked]

    return scores


def test_tag_long_texts(
    tokenizer: transformers.PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each entity once and in its place, wherever windows begin and end."""
    ours = TextEncoder.from_pretrained(headed("BertForTokenClassification", LABELS), tokenizer)
    labels = {"ada": "B-PER", "king": "I-PER", "paris": "B-LOC"}
    monkeypatch.setattr(ours._runner, "token_scores", by_word(tokenizer, labels))
    text = "".join(
        f"{i} " + ("Ada King left Paris" if i % 3 else "and so on,") + " — " for i in range(90)
    )
    (found,) = ours.tag([text])
    people = [e.start for e in found if e.label == "PER"]
    places = [e.start for e in found if e.label == "LOC"]
    assert people == [i for i in range(len(text)) if text.startswith("Ada King", i)]
    assert places == [i for i in range(len(text)) if text.startswith("Paris", i)]
    assert {e.text for e in found} == {"Ada King", "Paris"}
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        assert len(ours.tag(text, long_text="truncate")) < 12


def test_entities_that_touch(
    tokenizer: transformers.PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = TextEncoder.from_pretrained(headed("BertForTokenClassification", LABELS), tokenizer)
    labels = {"ada": "B-PER", "paris": "I-LOC", "london": "I-LOC", "acme": "ORG"}
    monkeypatch.setattr(ours._runner, "token_scores", by_word(tokenizer, labels))
    (found,) = ours.tag(["\ud800 Ada Ada Paris London and London"])
    assert [(e.label, e.text) for e in found] == [
        ("PER", "Ada"),
        ("PER", "Ada"),
        ("LOC", "Paris London"),
        ("LOC", "London"),
    ]
    assert ours.tag("") == [] and ours.tag([]) == []


def by_text(ranked: list[Ranked]) -> torch.Tensor:
    """Scores in the order of the texts."""
    return torch.tensor([one.score for one in sorted(ranked, key=lambda one: one.index)])


@pytest.mark.parametrize("activation", ["Sigmoid", "Identity"])
def test_rerank_as_cross_encoder_does(
    tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerBase, activation: str
) -> None:
    model = headed("BertForSequenceClassification", ["score"])
    model.config.sentence_transformers = {
        "activation_fn": f"torch.nn.modules.activation.{activation}"
        if activation == "Sigmoid"
        else f"torch.nn.modules.linear.{activation}"
    }
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = CrossEncoder(str(tmp_path), device=DEVICE, max_length=48)
    query = "Who wrote to Babbage?"
    # one that is cut, and one for which the query would be cut too
    texts = [*TEXTS, "and a text that is too long " * 20]
    # Five scores are too few to judge a rounding error by.
    many = [*texts, *(f"{text} {number}" for number in range(15) for text in TEXTS)]
    pairs = [(query, text) for text in many]
    original = torch.from_numpy(theirs.predict(pairs))
    wide = theirs.double()
    exact = torch.from_numpy(np.asarray(wide.predict(pairs, convert_to_tensor=True).cpu()))
    ours = TextEncoder.from_pretrained(str(tmp_path), device=DEVICE)
    with pytest.warns(UserWarning, match="1 of 65 texts"):
        row = compare("scores", by_text(ours.rerank(query, many)), original, exact)
    assert row.ok, row
    with pytest.warns(UserWarning, match="1 of 5 texts"):
        ranked = ours.rerank(query, texts)
    assert [one.index for one in ranked] == exact[:5].argsort(descending=True).tolist()
    scores = by_text(ranked)
    assert [one.text for one in ranked] == [texts[one.index] for one in ranked]
    assert ours.report().padded_batches == 0
    with pytest.warns(UserWarning):
        assert ours.rerank(query, iter(texts), top_k=2) == ranked[:2]
    # no window of a short text scores otherwise, and the long one scores by its best
    chunked = {one.index: one.score for one in ours.rerank(query, texts, long_text="chunk")}
    assert [chunked[i] for i in range(4)] == pytest.approx(scores[:4].tolist(), abs=1e-5)
    assert ours.rerank(query, []) == []


def test_token_embeddings(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    model = minilm().to(DEVICE)
    texts = ["Paris is the capital", "", "unbelievable"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt").to(DEVICE)
    with torch.inference_mode():
        original = model(**inputs).last_hidden_state.cpu()
        exact = minilm().to(DEVICE).double()(**inputs).last_hidden_state.cpu()
    ours = TextEncoder.from_pretrained(model, tokenizer)
    found = ours.token_embeddings(texts)
    assert found[0].tokens == ["[CLS]", "paris", "is", "the", "capital", "[SEP]"]
    assert found[1].tokens == ["[CLS]", "[SEP]"]
    for i, one in enumerate(found):
        assert one.tokens == tokenizer.convert_ids_to_tokens(tokenizer(texts[i])["input_ids"])
        assert one.vectors.shape == (len(one), 384)
        valid = slice(0, len(one))
        row = compare(texts[i], torch.from_numpy(one.vectors), original[i, valid], exact[i, valid])
        assert row.ok, row
    assert ours.token_embeddings("Paris is the capital").tokens == found[0].tokens


def test_token_embeddings_of_a_long_text(
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> None:
    ours = TextEncoder.from_pretrained(minilm().to(DEVICE), tokenizer)
    text = " ".join(f"word{i}" for i in range(400))
    ids = tokenizer(text, verbose=False)["input_ids"]
    whole = ours.token_embeddings(text, long_text="chunk")
    assert whole.tokens == tokenizer.convert_ids_to_tokens(ids)
    assert whole.vectors.shape == (len(ids), 384)
    with pytest.warns(UserWarning, match="1 of 1"):
        cut = ours.token_embeddings(text)
    assert cut.tokens == [*whole.tokens[: ours.max_length - 1], "[SEP]"]
    # up to the middle of the first overlap the first window's are the text's
    assert np.allclose(cut.vectors[:400], whole.vectors[:400], atol=1e-5)


def test_a_head_that_is_not_there(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    ours = TextEncoder.from_pretrained(minilm(), tokenizer)
    for method in (ours.classify, ours.tag, lambda texts: ours.rerank("q", texts)):
        with pytest.raises(ValueError, match="this is a BertModel"):
            method(["a"])
    two = TextEncoder.from_pretrained(
        headed("BertForSequenceClassification", ["no", "yes"]), tokenizer
    )
    with pytest.raises(ValueError, match="one output, and this model has 2"):
        two.rerank("q", ["a"])
    with pytest.raises(TypeError, match="query must be a string"):
        two.rerank(["q"], ["a"])


def test_a_model_with_a_head_embeds_too(
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> None:
    model = headed("BertForSequenceClassification", ["no", "yes"])
    ours = TextEncoder.from_pretrained(model, tokenizer, pooling="cls")
    inputs = tokenizer(TEXTS[0], return_tensors="pt").to(DEVICE)
    with torch.inference_mode():
        first = model.bert(**inputs).last_hidden_state[0, 0].cpu()
    assert np.allclose(ours.encode(TEXTS[0]), first, atol=1e-5)
