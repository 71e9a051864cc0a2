"""``parity`` and ``bench``: what they find out of a model, and what they refuse."""

import csv
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from berts import DEVICE, tiny

pytest.importorskip("typer")
pytest.importorskip("rich")
from cli_runs import call, one_line, tiny_model

import encoder_fast
from encoder_fast.cli.checkpoint import Checkpoint
from encoder_fast.cli.race import Rounds
from encoder_fast.parity import ParityReport

FLOAT32 = ("--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "encoder")


@pytest.mark.parametrize(
    ("head", "output"),
    [
        ("BertModel", "pooler_output"),
        ("BertForSequenceClassification", "logits"),
        ("BertForTokenClassification", "logits"),
        ("BertForQuestionAnswering", "start_logits"),
        ("BertForMaskedLM", "logits"),
        ("BertForMultipleChoice", "logits"),
    ],
)
def test_parity_of_each_layer_and_head(
    tmp_path: Path, monkeypatch, capsys, head: str, output: str
) -> None:
    folder = tiny_model(tmp_path / "model", head)
    assert call(monkeypatch, "parity", folder, *FLOAT32, "--dtype", "bfloat16") == 0
    shown = capsys.readouterr()
    assert shown.err == "" and head in shown.out
    for dtype in ("float32", "bfloat16"):
        assert f"{dtype}, backend" in shown.out
    for name in ("embeddings", "layer 1", "layer 2", output):
        (one, two) = (line for line in shown.out.splitlines() if line.startswith(f" {name} "))
        assert one.split()[-1] == two.split()[-1] == "ok"
        # bfloat16 has 16 bits less: were both tables of one dtype, this would not hold
        assert float(two.split()[-5]) > 100 * float(one.split()[-5])
    assert "layer 3" not in shown.out and "BROKEN" not in shown.out


def test_parity_in_a_sentence_transformers_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    tiny_model(tmp_path / "0_Transformer")
    (tmp_path / "modules.json").write_text('[{"idx": 0, "path": "0_Transformer", "type": "a.B"}]')
    assert call(monkeypatch, "parity", tmp_path, *FLOAT32) == 0
    assert "layer 2" in capsys.readouterr().out


def test_parity_on_texts_of_ones_own(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "in.csv"
    path.write_text("body\n" + "a b c d\n" * 5)
    arguments = ("parity", model, "--texts", path, "--column", "body", "--count", 3, *FLOAT32)
    assert call(monkeypatch, *arguments) == 0
    assert "3 texts, 18 tokens" in capsys.readouterr().out
    assert call(monkeypatch, "parity", model, "--texts", tmp_path / "no.txt") == 1
    assert "No such file" in one_line(capsys)
    (tmp_path / "none.txt").touch()
    assert call(monkeypatch, "parity", model, "--texts", tmp_path / "none.txt") == 1
    assert "has no texts" in one_line(capsys)


def test_broken_parity(model: Path, monkeypatch, capsys) -> None:
    check = encoder_fast.check_parity

    def broken(*arguments: object, **options: object) -> ParityReport:
        report = check(*arguments, **options)
        rows = [replace(row, error=row.allowed * 1.01) for row in report.rows[-1:]]
        return replace(report, rows=(*report.rows[:-1], *rows))

    monkeypatch.setattr(encoder_fast, "check_parity", broken, raising=False)
    assert call(monkeypatch, "parity", model, *FLOAT32) == 1
    shown = capsys.readouterr()
    assert shown.out.count("BROKEN") == 1 and shown.out.count(" ok") > 2
    assert shown.err == "encoder-fast: the parity rule is broken in float32\n"
    assert call(monkeypatch, "bench", model, *FLOAT32) == 1
    shown = capsys.readouterr()
    assert "the parity rule is broken in float32" in shown.err
    # and nothing was measured
    assert "real tokens/s" not in shown.out


def test_parity_of_what_did_not_run_fast(model: Path, monkeypatch, capsys) -> None:
    def fell_back(*_: object, **__: object) -> ParityReport:
        return ParityReport((), torch.float32, "cpu", {"a hook": 1})

    monkeypatch.setattr(encoder_fast, "check_parity", fell_back, raising=False)
    assert call(monkeypatch, "parity", model, *FLOAT32) == 1
    assert "nothing was proved: the original forward ran: a hook" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["parity", "bench"])
def test_models_that_can_not_run(
    model: Path, tmp_path: Path, monkeypatch, capsys, command: str
) -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=60)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "decoder")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / "decoder" / name).write_bytes((model / name).read_bytes())
    tiny().save_pretrained(tmp_path / "untokenised")
    (tmp_path / "empty").mkdir()
    (tiny_model(tmp_path / "damaged") / "model.safetensors").write_bytes(b"none")
    for name, message in (
        ("decoder", "GPT2Model"),
        ("untokenised", "no tokenizer that can be loaded"),
        ("empty", "a folder with a config.json is needed"),
        ("damaged", "no model in"),
        ("absent", "no such folder"),
    ):
        assert call(monkeypatch, command, tmp_path / name) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert call(monkeypatch, command, model, "--device", "cuda:9") == 1
    assert "--device cuda:9" in one_line(capsys)


def test_bench(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "figures.csv", tmp_path / "figures.png"
    sizes = ("--length", 16, "--length", 400, "--texts", 4, "--rounds", 2, "--seconds", 1)
    arguments = ("bench", model, *sizes, *FLOAT32, "--out", out, "--plot", plot)
    assert call(monkeypatch, *arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    # the model has 40 positions
    batches = ["mixed 16", "full 16", "mixed 40", "full 40"]
    labels = ["Hugging Face eager fp32", "Hugging Face SDPA fp32", "encoder_fast fp32"]
    assert [(row["batch"], row["contestant"]) for row in rows] == [
        (batch, label) for batch in batches for label in labels
    ]
    for row in rows:
        assert row["batch"] in shown.out and row["contestant"] in shown.out
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert row["torch"] == torch.__version__ and int(row["texts"]) == 4
        speed = int(row["real_tokens"]) / float(row["median_ms"]) * 1e3
        assert float(row["real_tokens_per_s"]) == pytest.approx(speed, rel=0.01)
        assert (row["padding"] == "0.000") == row["batch"].startswith("full")
        if "SDPA" in row["contestant"]:
            assert float(row["speedup"]) == 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["figures.csv", "figures.png"]


def test_an_architecture_without_sdpa(tmp_path: Path, model: Path) -> None:
    """Eager is then what the others are compared with."""
    from encoder_fast.cli.bench_run import Bench

    def load(self: Checkpoint, dtype: torch.dtype, attention: str) -> object:
        if attention == "sdpa":
            cause = ValueError("does not support an attention implementation through SDPA")
            raise self._wrong("no model", cause) from cause
        return original(self, dtype, attention)

    original = Checkpoint.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "load", load)
        bench = Bench(
            str(model),
            device=DEVICE,
            dtypes=[torch.float32],
            lengths=[8],
            texts=2,
            rounds=Rounds(1, 1, 0),
            with_compile=False,
        )
        results = list(bench.run())
    assert [timing.label for timing in results[0].timings] == [
        "Hugging Face eager fp32",
        "encoder_fast fp32",
    ]
    assert results[0].baseline == "Hugging Face eager fp32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plot", "out.gif"), "--plot out.gif: the name must end in .png"),
        (("--plot", "no/out.png"), "no such folder to write to"),
        (("--out", "no/out.csv"), "no such folder to write to"),
    ],
)
def test_mistakes_of_bench(
    model: Path, tmp_path: Path, monkeypatch, capsys, arguments: tuple, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "bench", model, *arguments) == 1
    assert message in one_line(capsys)


def test_without_matplotlib(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(monkeypatch, "bench", model, "--plot", tmp_path / "out.png") == 1
    assert "pip install 'encoder-fast[plot]'" in one_line(capsys)


def test_torch_compile_is_a_contestant(model: Path) -> None:
    """Named and compiled when asked for; whether a compiler is at hand is the machine's affair."""
    from encoder_fast.cli.bench_run import Bench

    for wanted in (False, True):
        bench = Bench(
            str(model),
            device=DEVICE,
            dtypes=[torch.float32],
            lengths=[8],
            texts=2,
            rounds=Rounds(1, 1, 0),
            with_compile=wanted,
        )
        compiled = [one for one in bench._contestants() if one.is_compiled]
        assert len(compiled) == wanted
        for one in compiled:
            found = bench._checkpoint.contestant(one)
            assert isinstance(found, torch._dynamo.eval_frame.OptimizedModule)
