"""``TextEncoder.encode``: what SentenceTransformer gives, for any input, in any order."""

import itertools
import json
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from berts import DEVICE, DTYPES, minilm, minilm_path, tiny

from encoder_fast import TextEncoder
from encoder_fast.backends import reference
from encoder_fast.parity import compare
from encoder_fast.text.batching import TokenBudget, is_out_of_memory
from encoder_fast.text.vectors import quantise

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling
from sentence_transformers.util.quantization import quantize_embeddings

HOME = "sentence_transformers.models"
FLAGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")

TEXTS = [
    "Paris is the capital of France.",
    "",
    "A text that goes on. " * 12,
    "naïve café, 東京, 🙂, ﬁne print",
    "[SEP] and [MASK] as a user writes them",
    "tab\tbell\x07nul\x00line\nend",
    "A text that goes on and on and is then cut. " * 60,
]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.from_pretrained(minilm_path(), device=DEVICE)


@pytest.fixture(scope="module")
def exact() -> SentenceTransformer:
    return SentenceTransformer(minilm_path(), device=DEVICE).double()


def folder(path: Path, pooling: str, normalize: bool) -> str:
    """A sentence-transformers folder around MiniLM, with settings of its own."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"{HOME}.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "query: "}, "truncate_dim": 200},
        "1_Pooling/config.json": {
            "word_embedding_dimension": 384,
            **{
                f"pooling_mode_{name}": name == f"{pooling}_token" + "s" * (pooling != "cls")
                for name in FLAGS
            },
        },
    }
    for file in Path(minilm_path()).iterdir():
        if file.is_file() and file.name not in files:
            (path / file.name).symlink_to(file)
    (path / "1_Pooling").mkdir()
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return str(path)


def wide(exact: SentenceTransformer, pooling: str, normalize: bool) -> SentenceTransformer:
    """The float64 twin of :func:`folder`'s model."""
    exact.max_seq_length = 64
    modules = [exact[0], Pooling(384, pooling_mode=pooling), *([Normalize()] if normalize else [])]
    return SentenceTransformer(
        modules=modules, device=DEVICE, prompts={"query": "query: "}, truncate_dim=200
    )


@pytest.mark.filterwarnings("ignore:.* were cut")
@pytest.mark.parametrize(
    ("pooling", "normalize", "dtype"),
    [
        ("cls", False, "fp32"),
        ("mean", False, "fp32"),
        ("mean", True, "fp32"),
        ("max", True, "fp32"),
        ("cls", True, "bf16"),
        ("mean", False, "bf16"),
        ("max", False, "bf16"),
    ],
)
def test_it_equals_sentence_transformers(
    tmp_path: Path, exact: SentenceTransformer, pooling: str, normalize: bool, dtype: str
) -> None:
    path = folder(tmp_path, pooling, normalize)
    ours = TextEncoder.from_pretrained(path, device=DEVICE, dtype=DTYPES[dtype])
    assert (ours.settings.pooling, ours.settings.normalize) == (pooling, normalize)
    assert ours.max_length == 64
    theirs = SentenceTransformer(path, device=DEVICE, model_kwargs={"dtype": DTYPES[dtype]})
    reference = wide(exact, pooling, normalize)
    for our_options, their_options in (
        ({}, {}),
        ({"normalize": True}, {"normalize_embeddings": True}),
        ({"prompt": "query"}, {"prompt_name": "query"}),
        ({"prompt": "about: ", "truncate_dim": 32}, {"prompt": "about: ", "truncate_dim": 32}),
    ):
        options = {**their_options, "convert_to_tensor": True}
        row = compare(
            str(our_options),
            torch.from_numpy(ours.encode(TEXTS, **our_options)),
            theirs.encode(TEXTS, **options).float().cpu(),
            reference.encode(TEXTS, **options).cpu(),
        )
        assert row.ok, row
    report = ours.report()
    assert report.padded_batches == 0 and report.packed_batches == report.model.fast_calls > 0


@pytest.mark.filterwarnings("ignore:.* were cut")
def test_a_live_sentence_transformer(tmp_path: Path, exact: SentenceTransformer) -> None:
    live = SentenceTransformer(folder(tmp_path, "max", True), device=DEVICE)
    theirs = live.encode(TEXTS, normalize_embeddings=True)
    reference = wide(exact, "max", True).encode(TEXTS, convert_to_tensor=True).cpu()
    ours = TextEncoder.from_pretrained(live)
    assert ours.settings.pooling == "max" and ours.settings.normalize and ours.max_length == 64
    row = compare("live", torch.from_numpy(ours.encode(TEXTS)), torch.from_numpy(theirs), reference)
    assert row.ok, row


def test_normalize_false_leaves_the_length(encoder: TextEncoder) -> None:
    lengths = np.linalg.norm(encoder.encode(["one", "two words"], normalize=False), axis=1)
    assert (lengths > 1.5).all()
    assert np.allclose(np.linalg.norm(encoder.encode(["one", "two words"]), axis=1), 1)


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_quantised_as_sentence_transformers_does(precision: str) -> None:
    vectors = torch.randn(150, 40).numpy()
    vectors[:, 3] = 0.5  # a dimension without a range
    ours = quantise(vectors, precision)
    assert ours.dtype == np.int8
    assert np.array_equal(ours, quantize_embeddings(vectors, precision=precision))


def test_precisions(encoder: TextEncoder) -> None:
    texts = TEXTS[:5]
    full = encoder.encode(texts)
    for precision in ("int8", "binary"):
        assert np.array_equal(encoder.encode(texts, precision=precision), quantise(full, precision))
        assert encoder.encode([], precision=precision).dtype == np.int8
    assert encoder.encode(texts[0], precision="binary").shape == (48,)
    with pytest.raises(ValueError, match="more than one text"):
        encoder.encode(texts[0], precision="int8")


def test_shapes_and_kinds_of_input(encoder: TextEncoder) -> None:
    texts = ["one", "two of them", "three"]
    expected = encoder.encode(texts)
    assert expected.shape == (3, 384) and expected.dtype == np.float32
    assert np.array_equal(encoder.encode(tuple(texts)), expected)
    assert np.array_equal(encoder.encode(text for text in texts), expected)
    assert np.array_equal(encoder.encode(np.array(texts)), expected)
    assert encoder.encode("one").shape == (384,)
    assert encoder.encode([]).shape == (0, 384)
    assert encoder.encode([], truncate_dim=5).shape == (0, 5)
    assert encoder.encode(iter(())).shape == (0, 384)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", 1.5], r"texts\[1\] is a float, not a string"),
        (itertools.chain(["a"] * 500, [None]), r"texts\[500\] is a NoneType"),
        ([b"a"], r"texts\[0\] is a bytes"),
        (b"abc", "iterable of strings, got bytes"),
        (None, "got NoneType"),
        (7, "got int"),
    ],
    ids=["float", "none-far-in", "bytes-in-list", "bytes", "none", "number"],
)
def test_what_is_no_text(encoder: TextEncoder, texts: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        encoder.encode(texts)


def test_lone_surrogates_and_control_characters(encoder: TextEncoder) -> None:
    odd = ["\ud800", "half \udc00 a pair", "\x00\x01\x1b", "\u202e\ufeff", "🙂 whole"]
    vectors = encoder.encode(odd)
    assert np.isfinite(vectors).all()
    replaced = encoder.encode([text.replace("\ud800", "\ufffd") for text in odd[:1]])
    assert np.array_equal(vectors[0], encoder.encode(odd)[0])
    assert np.allclose(vectors[0], replaced[0], atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"precision": "int4"}, {"long_text": "cut"}, {"truncate_dim": 0}, {"return_chunks": True}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_are_none(encoder: TextEncoder, options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        encoder.encode(["a"], **options)


def test_the_order_is_kept(encoder: TextEncoder) -> None:
    # more than the first blocks, of lengths that sorting turns around
    texts = [f"number {i} " + "and more " * (i * 7 % 11) for i in range(200)]
    vectors = encoder.encode(texts)
    alone = np.stack([encoder.encode(text) for text in texts[::40]])
    assert (vectors[::40] @ alone.T).argmax(axis=0).tolist() == list(range(5))
    assert np.allclose(vectors[::40], alone, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.* were cut")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_vector_does_not_depend_on_its_batch(exact: SentenceTransformer, dtype: str) -> None:
    """Two batches may differ by no more than the rule lets either differ from the exact vector."""
    ours = TextEncoder.from_pretrained(minilm_path(), device=DEVICE, dtype=DTYPES[dtype])
    theirs = SentenceTransformer(
        minilm_path(), device=DEVICE, model_kwargs={"dtype": DTYPES[dtype]}
    ).encode(TEXTS, convert_to_tensor=True)
    exact.max_seq_length = 256
    reference = exact.encode(TEXTS, convert_to_tensor=True).cpu()
    alone = torch.from_numpy(np.stack([ours.encode(text) for text in TEXTS]))
    for budget in (1, 90, 4096):
        ours._pipeline.budget = TokenBudget(budget)
        together = torch.from_numpy(ours.encode(TEXTS * 3))[: len(TEXTS)]
        row = compare("alone", alone, theirs.float().cpu(), reference)
        allowed = 2 * row.original_error + row.floor
        assert (together - alone).square().mean(dim=1).sqrt().max().item() <= allowed


def test_iterators_are_read_as_it_goes(encoder: TextEncoder) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield f"text {read}"

    stream = encoder.encode_stream(endless())
    first = next(stream)
    assert first.shape[1] == 384
    # what is computed and the block that is being tokenised meanwhile
    assert read <= 4 * len(first)
    second = next(stream)
    assert np.allclose(second[0], encoder.encode(f"text {len(first) + 1}"), atol=1e-5)
    stream.close()
    assert not _threads()


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("encoder_fast")]


def test_ctrl_c_leaves_no_thread(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    original = encoder._runner.pooled

    def interrupted(*args: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(encoder._runner, "pooled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode((f"text {i}" for i in itertools.count()), show_progress=True)
    assert not _threads()


def test_a_tokenizer_that_fails_leaves_no_thread(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> object:
        raise OverflowError("no such token")

    monkeypatch.setattr(encoder._pipeline.tokeniser, "tokens", broken)
    with pytest.raises(OverflowError, match="no such token"):
        encoder.encode(["a"] * 300)
    assert not _threads()


def test_memory_that_runs_out(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"number {i} " * (1 + i % 9) for i in range(60)]
    expected = encoder.encode(texts)
    original, sizes = encoder._runner.pooled, []

    def small(rows: list, mode: str) -> object:
        sizes.append(sum(len(row.ids) for row in rows))
        if sizes[-1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(rows, mode)

    monkeypatch.setattr(encoder._runner, "pooled", small)
    monkeypatch.setattr(encoder._pipeline, "budget", TokenBudget(4096))
    assert np.allclose(encoder.encode(texts), expected, atol=1e-5)
    assert sizes[0] > 200 and 100 < encoder.report().tokens_per_batch <= 200
    # of one text that does not fit, the caller hears
    monkeypatch.setattr(encoder, "max_length", 256)
    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError):
        encoder.encode("word " * 240)


def test_what_says_that_memory_ran_out() -> None:
    message = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
    assert is_out_of_memory(RuntimeError(message))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes don't fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        budget, lengths = TokenBudget(10), np.array([2, 2])

        def broken(_: np.ndarray) -> list:
            raise RuntimeError("shapes don't fit")

        list(budget.run(lengths, broken))


@pytest.mark.parametrize("budget", [1, 7, 10, 1000])
def test_batches_keep_to_the_budget(budget: int) -> None:
    lengths = np.array([3, 9, 1, 4, 12, 1, 5, 2])
    batches = [rows for rows, _ in TokenBudget(budget).run(lengths, lambda rows: rows)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(8))
    assert all(lengths[rows].sum() <= budget or len(rows) == 1 for rows in batches)
    with pytest.raises(ValueError, match="max_tokens_per_batch"):
        TokenBudget(0)


def test_truncation_is_said(encoder: TextEncoder) -> None:
    texts = ["short", "word " * 400, "word " * 300]
    before = encoder.report().cut
    with pytest.warns(UserWarning, match="2 of 3 texts were longer than 256 tokens") as said:
        encoder.encode(texts)
    assert said[0].filename == __file__
    assert encoder.report().cut == before + 2
    with pytest.raises(ValueError, match=r"texts\[1\] has 400 tokens and 254 fit"):
        encoder.encode(texts, long_text="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(texts[:1])
        encoder.encode(texts, long_text="chunk")


def test_a_progress_bar(encoder: TextEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    encoder.encode(["a text"] * 130, show_progress=True)
    shown = capsys.readouterr().err
    assert "130/130" in shown and "tokens/s" in shown
    encoder.encode(["a text"])
    assert capsys.readouterr().err == ""


def _tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(minilm_path())


def test_a_model_without_a_fast_path() -> None:
    """It runs its own forward, says so, and gives its own numbers."""
    torch.manual_seed(0)
    config = transformers.SqueezeBertConfig(
        vocab_size=30522,
        hidden_size=48,
        embedding_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = transformers.SqueezeBertModel(config).eval().to(DEVICE)
    with pytest.warns(UserWarning, match="SqueezeBertModel runs its own padded forward"):
        ours = TextEncoder.from_pretrained(model, _tokenizer(), pooling="mean")
    texts = TEXTS[:4]
    vectors = torch.from_numpy(ours.encode(texts))
    tokenizer = _tokenizer()
    for text, vector in zip(texts, vectors, strict=True):
        inputs = tokenizer(text, return_tensors="pt").to(DEVICE)
        with torch.inference_mode():
            alone = model(**inputs).last_hidden_state.mean(dim=1)[0].cpu()
            wide = model.double()(**inputs).last_hidden_state.mean(dim=1)[0].cpu()
            model.float()
        # as many rounding steps as the sum has tokens
        assert (vector - wide).abs().max() <= 2 * (alone - wide).abs().max() + 1e-6
    report = ours.report()
    assert report.packed_batches == 0 and report.padded_batches == 1
    assert "SqueezeBertModel" in str(report) and "not patched" in str(report)
    with pytest.raises(ValueError, match="SqueezeBertModel"):
        TextEncoder.from_pretrained(model, _tokenizer(), backend="reference")


def test_a_call_that_cannot_run_fast(encoder: TextEncoder) -> None:
    ours = TextEncoder.from_pretrained(minilm().to(DEVICE), _tokenizer())
    expected = ours.encode(TEXTS[:5])
    handle = ours.model.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert np.allclose(ours.encode(TEXTS[:5]), expected, atol=1e-5)
    report = ours.report()
    assert (report.packed_batches, report.padded_batches) == (1, 1)
    assert list(report.model.fallbacks.values()) == [1]
    handle.remove()
    # a hook on the whole encoder is run, by a call of it, which is fast
    seen = []
    ours.model.register_forward_hook(lambda *_: seen.append(1))
    assert np.allclose(ours.encode(TEXTS[:5]), expected, atol=1e-5)
    assert seen and ours.report().packed_batches == 2


def test_the_backend_asked_for() -> None:
    ours = TextEncoder.from_pretrained(minilm().to(DEVICE), _tokenizer(), backend="reference")
    assert ours.report().model.encoders[0].backend == "reference"
    with pytest.raises(ValueError, match="backend must be"):
        TextEncoder.from_pretrained(minilm(), _tokenizer(), backend="cudnn")


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_the_backend_asked_for_pools_too(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    ours = TextEncoder.from_pretrained(
        minilm().to(DEVICE), _tokenizer(), pooling=mode, backend="reference"
    )
    seen = []
    original = reference.pool
    monkeypatch.setattr(reference, "pool", lambda *given: seen.append(given) or original(*given))
    ours.encode(["Paris", "Berlin is in Germany"])
    assert [given[2] for given in seen] == [mode]


def test_a_tokenizer_of_another_model() -> None:
    ours = TextEncoder.from_pretrained(tiny(max_position_embeddings=64), _tokenizer())
    with pytest.raises(IndexError, match="they don't belong together"):
        ours.encode("Paris")


def test_a_slow_tokenizer() -> None:
    tokenizer = transformers.ByT5Tokenizer()
    model = tiny(vocab_size=400, max_position_embeddings=64)
    ours = TextEncoder.from_pretrained(model, tokenizer, pooling="max")
    texts = ["a", "b c", "é" * 100, ""]
    with pytest.warns(UserWarning, match="1 of 4 texts"):
        vectors = ours.encode(texts)
    inputs = tokenizer("b c", return_tensors="pt").to(DEVICE)
    with torch.inference_mode():
        alone = model(**inputs).last_hidden_state.amax(dim=1)[0].cpu()
    assert np.allclose(vectors[1], alone, atol=1e-5)
    assert ours.encode(texts, long_text="chunk").shape == (4, 48)
    with pytest.raises(ValueError, match="slow"):
        ours.encode(texts, long_text="chunk", return_chunks=True)


def test_similarity(encoder: TextEncoder) -> None:
    table = encoder.similarity(["a small dog"], ["a puppy", "the stock market"])
    assert table.shape == (1, 2) and table[0, 0] > table[0, 1] + 0.3
    left, right = encoder.encode(["a small dog"]), encoder.encode(["a puppy", "the stock market"])
    assert np.allclose(encoder.similarity(left, right * 3), table, atol=1e-5)
