"""The command line as a user meets it, and what the demo finds out."""

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from berts import DEVICE, minilm_path
from transformers import GPT2Config, GPT2Model

import encoder_fast

# The command line's own libraries, which a machine with nothing but PyTorch may lack.
pytest.importorskip("typer")
pytest.importorskip("rich")

from cli_runs import call, one_line, tiny_model
from rich.console import Console

from encoder_fast.backends.onednn import has_onednn
from encoder_fast.cli import demo_run
from encoder_fast.cli.checkpoint import default_device, read_passages
from encoder_fast.cli.demo import show
from encoder_fast.cli.demo_run import Demo, DemoResult
from encoder_fast.environment import Info

# What each query's best passage must say.
ANSWERS = ("two times", "name server", "warfarin", "evicted", "white dwarf")


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shown() -> tuple[DemoResult, str]:
    """The quick demo of the real model: what it found, and what an 80-column terminal showed."""
    minilm_path()
    console = Console(file=io.StringIO(), width=80, highlight=False)
    result = show(Demo(None, quick=True), console)
    return result, console.file.getvalue()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny-bert"))


def test_help_shows_examples(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    commands = ("demo", "info", "embed", "classify", "tag", "parity", "bench")
    for arguments in (["--help"], ["info", "-h"], *([name, "--help"] for name in commands)):
        assert call(monkeypatch, *arguments) == 0
        text = capsys.readouterr().out
        assert re.search(r"^  Examples?:\n    encoder-fast ", text, re.MULTILINE), text


def test_version(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"encoder-fast {encoder_fast.__version__}\n"


def test_info(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert call(monkeypatch, "info") == 0
    text = capsys.readouterr().out
    assert encoder_fast.__version__ in text and torch.__version__ in text
    assert "backend cpu: available" in text


def test_usage_error(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert call(monkeypatch, "demo", "--threads", "0") == 2
    assert "--threads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import encoder_fast", "torch triton transformers typer rich"),
        # what answers at once when the user only asks for help
        ("import encoder_fast.cli", "torch triton transformers"),
    ],
)
def test_imports_are_lazy(code: str, absent: str) -> None:
    check = f"import sys; {code}; print(*(set({absent.split()}) & set(sys.modules)))"
    process = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == ""


def test_missing_folder(tmp_path: Path) -> None:
    """In a process of its own: the line and the status alone, and no traceback."""
    process = subprocess.run(
        [sys.executable, "-m", "encoder_fast.cli", "demo", "--model", "nowhere"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.returncode == 1
    assert process.stderr == "encoder-fast: --model nowhere: no such folder\n"
    assert process.stdout == ""


def test_folder_without_a_model(tmp_path: Path, monkeypatch, capsys) -> None:
    assert call(monkeypatch, "demo", "--model", tmp_path) == 1
    assert "config.json" in one_line(capsys)


def test_folder_without_weights(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    assert call(monkeypatch, "demo", "--model", tmp_path) == 1
    assert str(tmp_path) in one_line(capsys)


def test_unsupported_model(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=60)).save_pretrained(tmp_path)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    assert call(monkeypatch, "demo", "--model", tmp_path) == 1
    assert "BertModel" in one_line(capsys)


def test_demo_model_not_installed(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(demo_run.importlib.util, "find_spec", lambda name: None)
    assert call(monkeypatch, "demo") == 1
    assert "encoder-fast[demo]" in one_line(capsys)


def test_out_in_a_missing_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    assert call(monkeypatch, "demo", "--out", tmp_path / "no" / "figures.json") == 1
    assert "no such folder to write to" in one_line(capsys)


def test_demo_of_a_local_model(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The whole command on a model shorter than the demo's texts."""
    out = tmp_path / "figures.json"
    arguments = ("--model", tiny_folder, "--quick", "--threads", "1", "--seed", "3", "--out", out)
    assert call(monkeypatch, "demo", *arguments) == 0
    record = json.loads(out.read_text())
    assert {"command", "commit", "date", "device", "versions", "parity"} <= record.keys()
    for batch in record["batches"]:
        for label, seconds in batch["seconds"].items():
            assert min(seconds) <= batch["median_seconds"][label] <= max(seconds)
    printed = capsys.readouterr()
    assert tiny_folder.name in printed.out and "4 to 40 tokens" in printed.out
    assert printed.err == ""
    assert torch.get_num_threads() == 1


def test_broken_parity_fails(tiny_folder: Path, monkeypatch, capsys) -> None:
    def broken(self: Demo) -> tuple:
        (report, *_) = parity(self)
        return (replace(report, rows=tuple(replace(row, error=1.0) for row in report.rows)),)

    parity = Demo.parity
    monkeypatch.setattr(Demo, "parity", broken)
    assert call(monkeypatch, "demo", "--model", tiny_folder, "--quick") == 1
    printed = capsys.readouterr()
    assert "BROKEN" in printed.out and "parity" in printed.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU always has bf16 here")
def test_without_bf16_instructions(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_run, "has_onednn", lambda dtype: dtype == torch.float32)
    console = Console(file=io.StringIO(), width=80)
    result = show(Demo(tiny_folder, quick=True), console)
    assert "bf16 is left out" in console.file.getvalue()
    assert [report.dtype for report in result.parity] == [torch.float32]
    assert not any("bf16" in t.label for batch in result.batches for t in batch.timings)


def test_demo_proves_parity(shown: tuple[DemoResult, str]) -> None:
    result, _ = shown
    assert result.ok
    assert result.parity[0].dtype == torch.float32
    assert all(math.isfinite(report.worst_ratio) for report in result.parity)


def test_demo_times_everyone(shown: tuple[DemoResult, str]) -> None:
    result, text = shown
    name = "fp16" if result.place.device == "cuda" else "fp32"
    labels = {
        f"{who} {name}" for who in ("Hugging Face eager", "Hugging Face SDPA", "encoder_fast")
    }
    if result.place.device == "cpu" and has_onednn(torch.bfloat16):
        labels |= {"Hugging Face SDPA bf16", "encoder_fast bf16"}
    assert [batch.name for batch in result.batches] == ["mixed lengths", "no padding"]
    for batch in result.batches:
        assert labels == {timing.label for timing in batch.timings}
        assert len({len(timing.seconds) for timing in batch.timings}) == 1
        for timing in batch.timings:
            assert 0 < batch.speedup(timing) < math.inf and timing.spread >= 0
            assert text.count(timing.label) >= len(result.batches)
    mixed, equal = result.batches
    assert 0.4 < mixed.padding < 0.6 and equal.padding == 0


def test_demo_says_where_it_runs(shown: tuple[DemoResult, str]) -> None:
    result, text = shown
    place = result.place
    assert place.device == DEVICE
    assert place.backend == ("triton" if place.device == "cuda" else "cpu")
    assert place.processor in text and place.why in text
    assert torch.__version__ in text and encoder_fast.__version__ in text


@pytest.mark.parametrize(
    ("devices", "triton", "expected"),
    [
        (("NVIDIA H100",), "available", "cuda"),
        (("NVIDIA H100",), "triton is not installed", "cpu"),
        ((), "available", "cpu"),  # in its interpreter
        ((), "triton is not installed", "cpu"),
    ],
)
def test_default_device(devices: tuple[str, ...], triton: str, expected: str) -> None:
    info = Info({}, "Linux-x86_64", "2 threads", devices, {"cpu": "available", "triton": triton})
    assert default_device(info) == expected


def test_demo_fits_80_columns(shown: tuple[DemoResult, str]) -> None:
    _, text = shown
    assert max(map(len, text.splitlines())) <= 80
    # a table that is squeezed loses figures to an ellipsis; only passages may
    assert all(re.match(r"  0\.\d\d  ", line) for line in text.splitlines() if "…" in line)


def test_search_finds_the_answers(shown: tuple[DemoResult, str]) -> None:
    result, text = shown
    assert [answer.query for answer in result.answers] == list(demo_run.QUERIES)
    for answer, expected in zip(result.answers, ANSWERS, strict=True):
        (score, best), (second, _) = answer.hits
        assert expected in best
        assert 1 >= score > second
        assert f"{score:.2f}  {best[:40]}" in text


def test_answers_share_no_word_with_their_query() -> None:
    """Else a search by words would do as well."""
    passages = read_passages()
    for query, expected in zip(demo_run.QUERIES, ANSWERS, strict=True):
        (passage,) = (p for p in passages if expected in p)
        query_words, words = (set(re.findall(r"[a-z]{4,}", x.lower())) for x in (query, passage))
        assert not query_words & words


def test_passages() -> None:
    passages = read_passages()
    assert 40 <= len(passages) == len(set(passages))
    lengths = [len(passage.split()) for passage in passages]
    assert min(lengths) <= 7 and max(lengths) >= 55
