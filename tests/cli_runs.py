"""Commands run in this process, and small models and inputs on disk for them."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from berts import tiny

from encoder_fast.cli import main
from encoder_fast.text.runner import Runner

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]


def tiny_model(folder: Path, head: str = "BertModel", seed: int = 0, **changes: object) -> Path:
    """A random BERT of 40 positions whose tokenizer knows letters alone."""
    folder.mkdir(exist_ok=True)
    model = tiny(head, seed, vocab_size=len(VOCABULARY), **changes)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 40})
    )
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object, stdin: bytes | None = None) -> int:
    """Run a command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["encoder-fast", *map(str, arguments)])
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error that was printed, which must be a single line."""
    message = capsys.readouterr().err
    assert message.startswith("encoder-fast: ") and message.count("\n") == 1, message
    return message


class Stop:
    """Makes the model raise after it has run a number of batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batches: int, error: BaseException):
        original = Runner.pooled

        def pooled(runner: Runner, *arguments: object) -> object:
            if self.left == 0:
                self.left -= 1
                raise error
            self.left -= 1
            return original(runner, *arguments)

        self.left = batches
        monkeypatch.setattr(Runner, "pooled", pooled)


# The fourth is longer than the model takes; the last is empty.
TEXTS = ["a b c", "d, e", 'f "g" h', "x " * 60, "ü ß 東", "a", "h e l l o", "t e n", "i", ""]
BLOCK = ("--block-size", 4)


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("".join(text + "\n" for text in TEXTS), "utf-8")
    return path


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
