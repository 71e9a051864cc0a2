"""``TextEncoder`` under conditions that are easily forgotten."""

import copy
import itertools
import json
import pickle
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from berts import DEVICE, minilm_path, tiny

from encoder_fast import TextEncoder
from encoder_fast.text.batching import is_out_of_memory

TEXTS = ["one", "two of them", "a third that is a little longer", ""]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.from_pretrained(minilm_path(), device=DEVICE)


def folder(path: Path, **files: object) -> Path:
    """A sentence-transformers folder around MiniLM; ``files`` by name without suffix."""
    home = "sentence_transformers.models"
    content = {
        "modules": [
            {"path": "", "type": f"{home}.Transformer"},
            {"path": "1_Pooling", "type": f"{home}.Pooling"},
        ],
        **files,
    }
    for file in Path(minilm_path()).iterdir():
        if file.is_file() and file.name not in ("sentence_bert_config.json", "modules.json"):
            (path / file.name).symlink_to(file)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    for name, value in content.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (path / f"{name}.json").write_text(text)
    return path


def modules(*names: str) -> list[dict[str, str]]:
    return [
        {"path": "", "type": name if "." in name else f"sentence_transformers.models.{name}"}
        for name in names
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("Transformer", "Pooling", "Dense"), "a module Dense"),
        (("Transformer", "Normalize", "Pooling"), "one Pooling behind it, and Normalize behind"),
        (("Transformer", "Normalize"), "one Pooling behind it, and Normalize behind"),
        (("Transformer", "Pooling", "Pooling"), "one Transformer, one Pooling"),
        (("WordEmbeddings", "Pooling"), "a module WordEmbeddings"),
        (("custom_st.Transformer", "Pooling"), "a module of its own, custom_st.Transformer"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_modules_it_does_not_have(tmp_path: Path, names: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_pretrained(folder(tmp_path, modules=modules(*names)))


def test_a_broken_settings_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sentence_bert_config.json of .* is no JSON"):
        TextEncoder.from_pretrained(folder(tmp_path, sentence_bert_config="{"))


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_old_names_of_the_settings_file(tmp_path: Path, name: str) -> None:
    files = {f"sentence_{name}_config": {"max_seq_length": 33, "do_lower_case": False}}
    assert TextEncoder.from_pretrained(folder(tmp_path, **files)).max_length == 33


def test_what_a_folder_wants_to_be_loaded_with(tmp_path: Path) -> None:
    wanted = {
        "max_seq_length": 64,
        "model_args": {"torch_dtype": "bfloat16", "trust_remote_code": True},
        "tokenizer_args": {"truncation_side": "left"},
    }
    path = folder(tmp_path, sentence_bert_config=wanted)
    found = TextEncoder.from_pretrained(path, device=DEVICE)
    assert found.model.dtype == torch.bfloat16
    assert found.tokenizer.truncation_side == "left"
    # what the caller asks for comes first
    assert TextEncoder.from_pretrained(path, dtype="float32").model.dtype == torch.float32
    (path / "sentence_bert_config.json").write_text('{"config_args": {"hidden_act": "relu"}}')
    with pytest.raises(ValueError, match=r"config_args\.hidden_act"):
        TextEncoder.from_pretrained(path)


def test_max_length_may_be_set(encoder: TextEncoder) -> None:
    text = "word " * 300
    before = encoder.max_length
    try:
        encoder.max_length = 512
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            long = encoder.token_embeddings(text)
        encoder.max_length = 10
        with pytest.warns(UserWarning, match="longer than 10 tokens"):
            short = encoder.token_embeddings(text)
        for wrong in (2, 513):
            with pytest.raises(ValueError, match="at most the model's 512 positions"):
                encoder.max_length = wrong
    finally:
        encoder.max_length = before
    assert (len(long), len(short)) == (302, 10)


def test_a_model_in_training_mode() -> None:
    """A loaded model may be put back to training by its owner; dropout would be no vector."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    model = tiny(vocab_size=30522, hidden_dropout_prob=0.5)
    ours = TextEncoder.from_pretrained(model, tokenizer)
    expected = ours.encode(TEXTS)
    model.train()
    assert np.array_equal(ours.encode(TEXTS), expected)
    assert ours.report().padded_batches == 0


def test_similarity_of_vectors_of_any_kind(encoder: TextEncoder) -> None:
    vectors = encoder.encode(TEXTS)
    expected = encoder.similarity(vectors, vectors)
    for kind in (vectors.astype(np.float64), torch.tensor(vectors), torch.tensor(vectors).half()):
        assert np.allclose(encoder.similarity(kind, TEXTS), expected, atol=1e-3)
    assert encoder.similarity(torch.tensor(vectors[0]), vectors).shape == (1, 4)
    assert encoder.similarity([], TEXTS).shape == (0, 4)
    with pytest.raises(ValueError, match=r"float vectors, not torch\.int8"):
        encoder.similarity(encoder.encode(TEXTS, precision="int8"), "one")


def test_options_of_a_wrong_kind(encoder: TextEncoder) -> None:
    with pytest.raises(TypeError, match="prompt must be a string, got int"):
        encoder.encode(TEXTS, prompt=5)
    with pytest.raises(ValueError, match="truncate_dim must be an integer"):
        encoder.encode(TEXTS, truncate_dim=3.5)
    # more than there are, as in sentence-transformers
    assert encoder.encode(TEXTS, truncate_dim=1000).shape == (4, 384)


def test_a_regression_head_has_no_labels() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    model = tiny(
        "BertForSequenceClassification",
        vocab_size=30522,
        num_labels=1,
        problem_type="regression",
    )
    with pytest.raises(ValueError, match="one for regression"):
        TextEncoder.from_pretrained(model, tokenizer).classify(TEXTS)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
        "CUDA driver error: out of memory",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    ],
)
def test_ways_to_say_that_memory_ran_out(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("encoder_fast")]


def test_an_iterator_that_raises(encoder: TextEncoder) -> None:
    def texts() -> Iterator[str]:
        yield from (f"text {i}" for i in range(400))
        raise KeyError("the database is gone")

    with pytest.raises(KeyError, match="the database is gone"):
        encoder.encode(texts())
    assert not _threads()
    blocks = encoder.encode_stream(texts())
    assert np.allclose(next(blocks)[:1], encoder.encode(["text 0"]), atol=1e-5)
    with pytest.raises(KeyError):
        list(blocks)
    assert not _threads()


def test_ctrl_c_drops_what_has_not_begun(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the main thread waits for the tokenizer, only the block it is at is waited for."""
    begun = []
    original = encoder._pipeline.tokeniser.tokens
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def slow(texts: list[str], **options: object) -> object:
        begun.append(len(texts))
        if len(begun) == 2:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert interrupted.wait(60)
        return original(texts, **options)

    monkeypatch.setattr(encoder._pipeline.tokeniser, "tokens", slow)
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            encoder.encode(f"text {i}" for i in itertools.count())
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(begun) == 2 and not _threads()


def test_threads_share_an_encoder(encoder: TextEncoder) -> None:
    """Each gets what it would get alone, bit for bit: nothing of one batch is in another's."""
    lists = [[f"thread {i} text {j} " + "w " * (j % 40) for j in range(50)] for i in range(4)]
    expected = [encoder.encode(texts) for texts in lists]
    found: dict[int, np.ndarray | BaseException] = {}

    def work(number: int) -> None:
        try:
            found[number] = encoder.encode(lists[number])
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, vectors in enumerate(expected):
        assert np.array_equal(found[number], vectors)


def test_copies_and_pickles(encoder: TextEncoder) -> None:
    """As a pool of processes needs it."""
    expected = encoder.encode(TEXTS)
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert np.allclose(twin.encode(TEXTS), expected, atol=1e-6)
        assert twin.encode(TEXTS[0]).shape == (384,)


def test_a_warning_in_code_without_a_name(encoder: TextEncoder) -> None:
    with pytest.warns(UserWarning, match="were cut"):
        exec("encoder.encode('word ' * 400)", {"encoder": encoder})


def test_a_given_block_size(encoder: TextEncoder) -> None:
    """A run that begins with a block gives that block's bits."""
    texts = [f"number {i} " + "and more " * (i * 7 % 11) for i in range(50)]
    whole = list(encoder.encode_stream(texts, block_size=16))
    assert [len(block) for block in whole] == [16, 16, 16, 2]
    later = list(encoder.encode_stream(texts[32:], block_size=16))
    assert np.array_equal(np.concatenate(later), np.concatenate(whole[2:]))
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        encoder.encode_stream(texts, block_size=0)
