"""``embed``, ``classify`` and ``tag``: any input to any output, and what bad input gets."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from berts import tiny

pytest.importorskip("typer")
pytest.importorskip("rich")
from cli_runs import BLOCK, TEXTS, call, keep_threads, lines, model, one_line, tiny_model

from encoder_fast import TextEncoder
from encoder_fast.cli.errors import UserError
from encoder_fast.cli.records import Record, Source
from encoder_fast.text.runner import Runner
from encoder_fast.text.vectors import quantise

# of the encoder that the commands are compared with
pytestmark = pytest.mark.filterwarnings("ignore:.* were cut")

__all__ = ["keep_threads", "lines", "model"]  # fixtures

LABELS = {"id2label": {0: "O", 1: "B-PER", 2: "I-PER", 3: "LOC"}}


@pytest.fixture(scope="module")
def expected(model: Path) -> np.ndarray:
    """The vectors of ``TEXTS``, with the blocks that the commands are told to make."""
    return vectors(model, TEXTS)


def vectors(model: Path, texts: list[str], **options: object) -> np.ndarray:
    encoder = TextEncoder.from_pretrained(model)
    return np.concatenate(list(encoder.encode_stream(texts, block_size=4, **options)))


def write_input(folder: Path, suffix: str) -> Path:
    """``TEXTS`` under the column ``body``, with ids ``T0``, ``T1`` …"""
    path = folder / f"in.{suffix}"
    ids = [f"T{number}" for number in range(len(TEXTS))]
    if suffix in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
            table.writerows([["id", "body"], *zip(ids, TEXTS, strict=True)])
    elif suffix == "jsonl":
        rows = [{"id": name, "body": text} for name, text in zip(ids, TEXTS, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": ids, "body": TEXTS}), path, row_group_size=3)
    return path


def read_output(path: Path) -> tuple[list, np.ndarray]:
    """The ids, where there are any, and the vectors."""
    if path.suffix == ".npy":
        return [], np.load(path)
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    else:
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    values = np.array([row["embedding"] for row in rows])
    return [row["id"] for row in rows], values.astype(np.float32)


@pytest.mark.parametrize("to", ["npy", "jsonl", "parquet"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_embed_from_any_format_to_any(
    model: Path, expected: np.ndarray, tmp_path: Path, monkeypatch, capsys, suffix: str, to: str
) -> None:
    if to == "parquet":
        pytest.importorskip("pyarrow")
    source, out = write_input(tmp_path, suffix), tmp_path / f"out.{to}"
    with_ids = () if to == "npy" else ("--id-column", "id")
    arguments = ("embed", source, "--column", "body", *with_ids, "-m", model, "-o", out)
    assert call(monkeypatch, *arguments, *BLOCK) == 0
    ids, found = read_output(out)
    assert np.array_equal(found, expected)
    assert ids == ([] if to == "npy" else [f"T{number}" for number in range(len(TEXTS))])
    said = capsys.readouterr()
    assert said.out == "" and "10 records" in said.err
    assert "1 of 10 texts were longer than 40 tokens and were cut" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, out.name]


def test_embed_from_lines_to_lines(
    model: Path, expected: np.ndarray, lines: Path, monkeypatch, capsysbinary
) -> None:
    """From standard input to standard output, which has nothing but results."""
    data = lines.read_bytes()
    assert call(monkeypatch, "embed", "-", "-m", model, "-o", "-", *BLOCK, stdin=data) == 0
    rows = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert [row["id"] for row in rows] == list(range(len(TEXTS)))
    assert np.array_equal(np.array([row["embedding"] for row in rows], np.float32), expected)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("--normalize",), {"normalize": True}),
        (("--truncate-dim", 7), {"truncate_dim": 7}),
        (("--prompt", "q r s "), {"prompt": "q r s "}),
        (("--long-text", "chunk"), {"long_text": "chunk"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_options_of_embed(
    model: Path, lines: Path, tmp_path: Path, monkeypatch, arguments: tuple, options: dict
) -> None:
    out = tmp_path / "out.npy"
    assert call(monkeypatch, "embed", lines, "-m", model, "-o", out, "-q", *BLOCK, *arguments) == 0
    assert np.array_equal(np.load(out), vectors(model, TEXTS, **options))


def test_pooling_and_dtype(model: Path, lines: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out.npy"
    arguments = ("--pooling", "max", "--dtype", "bfloat16", *BLOCK)
    assert call(monkeypatch, "embed", lines, "-m", model, "-o", out, *arguments) == 0
    encoder = TextEncoder.from_pretrained(model, pooling="max", dtype="bfloat16")
    found = np.concatenate(list(encoder.encode_stream(TEXTS, block_size=4)))
    assert np.array_equal(np.load(out), found)


@pytest.mark.parametrize("precision", ["int8", "binary"])
@pytest.mark.parametrize("to", ["npy", "jsonl", "parquet"])
def test_precisions(
    model: Path, expected: np.ndarray, lines: Path, tmp_path: Path, monkeypatch, precision, to
) -> None:
    """int8 scales by the range of all blocks, as if they were one."""
    if to == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"out.{to}"
    arguments = ("embed", lines, "-m", model, "-o", out, "--precision", precision)
    assert call(monkeypatch, *arguments, *BLOCK) == 0
    found = read_output(out)[1]
    assert np.array_equal(found, quantise(expected, precision))
    if to == "npy":
        assert found.dtype == np.int8


def test_an_input_without_records(model: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "none.txt").touch()
    out = tmp_path / "out.npy"
    assert call(monkeypatch, "embed", tmp_path / "none.txt", "-m", model, "-o", out) == 0
    assert np.load(out).shape == (0, 48)


def test_lines_as_they_are(tmp_path: Path) -> None:
    """Only a newline ends a line, and an empty line is an empty text."""
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffone\r\n\ntwo\u2028three\x85\nlast".encode())
    assert [record.text for record in Source(str(path), None, None, None)] == [
        "one",
        "",
        "two\u2028three\x85",
        "last",
    ]


def test_csv_fields_of_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text('n,text\r\n7,"one\r\ntwo"\r\n\r\n8,"say ""hi"""\r\n')
    assert list(Source(str(path), None, None, "n")) == [
        Record("7", "one\r\ntwo"),
        Record("8", 'say "hi"'),
    ]


CSV, JSONL = "id,body\n1,good\n", '{"body": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", CSV + '2,"never closed\n3,c\n', "in.csv, line 3: unexpected end of data"),
        ("in.csv", CSV + "2,b,c\n", "in.csv, line 3: 3 fields, and the header has 2"),
        ("in.csv", CSV + "2\n", "in.csv, line 3: 1 fields"),
        ("in.csv", CSV.encode() + b"2,\xff\n", "in.csv, line 3: byte 0xff is not UTF-8"),
        ("in.csv", "id,text\n1,a\n", "has no column 'body'; it has 'id', 'text'"),
        ("in.csv", "", "is empty: a csv begins with"),
        ("in.csv", "\ufeff", "is empty: a csv begins with"),
        ("in.csv", "\ufeffbody,id,body\na,1,b\n", "in.csv has 2 columns 'body'"),
        ("in.CSV", CSV + "2,b,c\n", "in.CSV, line 3: 3 fields"),
        ("in.tsv", "body\tbody\na\tb\n", "in.tsv has 2 columns 'body'"),
        ("in.jsonl", JSONL + '{"body": "torn\n', "in.jsonl, line 2: no JSON"),
        ("in.jsonl", JSONL + '{"body": 3}\n', "line 2: 'body' is a number, not a string"),
        ("in.jsonl", JSONL + '{"body": null}\n', "line 2: 'body' is null, not a string"),
        ("in.jsonl", JSONL + '\n"bare"\n', "line 3: a string, not an object"),
        ("in.jsonl", JSONL + '{"text": "a"}\n', "line 2: no key 'body'; it has 'text'"),
        ("in.jsonl", JSONL + "[" * 100_000, "line 2: no JSON"),
        (
            "in.JSONL",
            JSONL + '{"body": "a", "body": "b"}\n',
            "line 2: an object has the key 'body' 2",
        ),
        ("in.parquet", b"PAR1 and no more", "can't be read as parquet"),
        ("in.pq", b"", "can't be read as parquet"),
        ("in.docx", "a", "the name does not tell the format"),
    ],
)
def test_broken_inputs(
    model: Path, tmp_path: Path, monkeypatch, capsys, name: str, content: str | bytes, message: str
) -> None:
    if name.endswith(("parquet", "pq")):
        pytest.importorskip("pyarrow")
    path, out = tmp_path / name, tmp_path / "out.npy"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert call(monkeypatch, "embed", path, "--column", "body", "-m", model, "-o", out) == 1
    assert message in one_line(capsys)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"body": [1, 2]}, "column 'body' is int64, not string"),
        ({"body": ["a", None]}, "row 1: 'body' is null"),
        ({"text": ["a"]}, "has no column 'body'"),
        ({"body": ["a"], "id": [1.5]}, "the id 'id' is a number"),
        ({"body": ["a"], "id": [b"b"]}, "the id 'id' is of type bytes"),
        ({"body": [None, None]}, "column 'body' is null, not string"),
    ],
    ids=["numbers", "null", "absent", "id", "bytes", "nulls"],
)
def test_broken_parquet(
    model: Path, tmp_path: Path, monkeypatch, capsys, column: dict, message: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table(column), path)
    ids = ("--id-column", "id") if "id" in column else ()
    arguments = ("embed", path, "--column", "body", *ids, "-m", model, "-o", tmp_path / "o.jsonl")
    assert call(monkeypatch, *arguments) == 1
    assert message in one_line(capsys)


@pytest.mark.parametrize("twice", ["body", "id"])
def test_parquet_columns_of_one_name(tmp_path: Path, twice: str) -> None:
    """An error where the name is asked for; others may have any name."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "in.PARQUET")
    names = ["body", "id", twice, "other", "other"]
    table = pyarrow.Table.from_arrays([pyarrow.array([name]) for name in "abcde"], names=names)
    parquet.write_table(table, path)
    with pytest.raises(UserError, match=f"has 2 columns '{twice}'"):
        list(Source(path, None, "body", "id"))
    if twice == "id":
        assert list(Source(path, None, "body", None)) == [Record(0, "a")]


@pytest.mark.parametrize(
    ("kind", "encoded"),
    # pyarrow writes no dictionary of string views
    [("string", False), ("string", True), ("large_string", True), ("string_view", False)],
)
def test_kinds_of_parquet_strings(tmp_path: Path, kind: str, encoded: bool) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = pyarrow.array(["b", "ü", "b"], getattr(pyarrow, kind)())
    if encoded:
        values = values.dictionary_encode()
    path = str(tmp_path / "in.pq")
    parquet.write_table(pyarrow.table({"text": values, "id": values}), path)
    assert list(Source(path, None, None, "id")) == [Record(text, text) for text in ("b", "ü", "b")]
    wrong = pyarrow.Array.from_buffers(
        pyarrow.string(),
        1,
        [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")],
    )
    parquet.write_table(pyarrow.table({"text": wrong}), path)
    with pytest.raises(UserError, match="byte 0xff is not UTF-8"):
        list(Source(path, None, None, None))


def test_names_in_capitals(tmp_path: Path) -> None:
    """As exports on Windows have them: the same records."""
    for name, content in (
        ("in.TXT", "a b\n"),
        ("in.Csv", '\ufefftext,id\n"a b",1\n'),
        ("in.TSV", "\ufeff\ntext\tid\na b\t1\n"),
        ("in.NDJSON", '\ufeff{"text": "a b"}\n'),
    ):
        path = tmp_path / name
        path.write_text(content, "utf-8")
        assert list(Source(str(path), None, None, None)) == [Record(0, "a b")]
    (tmp_path / "mark.txt").write_text("\ufeff", "utf-8")
    assert list(Source(str(tmp_path / "mark.txt"), None, None, None)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("embed", "nowhere.txt", "-o", "o.npy"), "nowhere.txt: No such file or directory"),
        (("embed", ".", "-o", "o.npy"), ". is a folder"),
        (("embed", "lines.txt", "-o", "o.npy", "--column", "body"), "lines.txt is text"),
        (("embed", "lines.txt", "-o", "o.xyz"), "the name does not tell the format; give --format"),
        (("embed", "lines.txt", "-o", "o.csv"), "this command has npy, jsonl, parquet"),
        (("embed", "lines.txt", "-o", "no/o.npy"), "no such folder to write to"),
        (("embed", "lines.txt", "-o", "-", "--format", "npy"), "can't be written to a pipe"),
        (("embed", "lines.txt", "-o", "-", "--resume"), "--resume needs an output that is a file"),
        (("embed", "lines.txt", "-o", "-", "--precision", "int8"), "its output is a file"),
        (("embed", "one.txt", "-o", "o.npy", "--precision", "int8"), "the input has one record"),
        (("embed", "in.csv", "-o", "o.npy", "--id-column", "id"), "npy has no place for ids"),
        (("embed", "lines.txt", "-o", "there.npy"), "there.npy exists: --overwrite"),
        (("embed", "lines.txt", "-o", "o.npy", "--long-text", "error"), "record 3 has 60 tokens"),
        (("embed", "lines.txt", "-o", "o.npy", "--device", "cuda:9"), "--device cuda:9"),
        (
            ("embed", "lines.txt", "-o", "o.npy", "--prompt", "q " * 40, "--long-text", "chunk"),
            "leaves no room for texts",
        ),
        (("classify", "lines.txt"), "classify needs a model …ForSequenceClassification"),
        (("tag", "lines.txt"), "tag needs a model …ForTokenClassification"),
        (("classify", "lines.txt", "-o", "o.npy"), "this command has jsonl, csv, parquet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes(
    model: Path, lines: Path, tmp_path: Path, monkeypatch, capsys, arguments: tuple, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("alone\n")
    Path("in.csv").write_text("id,text\n1,a\n")
    Path("there.npy").write_bytes(b"before")
    assert call(monkeypatch, *arguments, "-m", model) == 1
    assert message in one_line(capsys)
    assert Path("there.npy").read_bytes() == b"before"
    assert not list(tmp_path.glob("o.*"))


def test_models_that_can_not_be_loaded(
    model: Path, lines: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    tiny().save_pretrained(tmp_path / "untokenised")
    (tmp_path / "empty").mkdir()
    damaged = tiny_model(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"none")
    for folder, message in (
        ("untokenised", "no tokenizer"),
        ("empty", "a folder with a config.json is needed"),
        ("damaged", "--model"),
        ("./absent", "no such folder"),
    ):
        name = folder if folder.startswith(".") else tmp_path / folder
        assert call(monkeypatch, "embed", lines, "-m", name, "-o", tmp_path / "o.npy") == 1
        assert message in one_line(capsys)


def test_a_model_without_a_fast_path(
    model: Path, lines: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """It runs and says so; with a backend by name it is an error."""
    import transformers

    folder = tmp_path / "squeeze"
    sizes = {"hidden_size": 32, "embedding_size": 32, "num_hidden_layers": 1}
    config = transformers.SqueezeBertConfig(
        vocab_size=60, num_attention_heads=4, intermediate_size=32, **sizes
    )
    transformers.SqueezeBertModel(config).save_pretrained(folder)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    arguments = ("embed", lines, "-m", folder, "-o", tmp_path / "out.npy")
    assert call(monkeypatch, *arguments, "--backend", "reference") == 1
    assert "SqueezeBertModel" in one_line(capsys)
    assert call(monkeypatch, *arguments) == 0
    assert "note: SqueezeBertModel runs its own padded forward" in capsys.readouterr().err


def test_without_pyarrow(model: Path, lines: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "in.parquet").touch()
    for source, out in ((lines, "out.parquet"), (tmp_path / "in.parquet", "out.npy")):
        assert call(monkeypatch, "embed", source, "-m", model, "-o", tmp_path / out) == 1
        assert "pip install 'encoder-fast[parquet]'" in one_line(capsys)


def test_a_vector_that_is_not_finite(
    model: Path, lines: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    original = Runner.pooled

    def overflowing(runner: Runner, rows: list, mode: str) -> torch.Tensor:
        out = original(runner, rows, mode).clone()
        out[[len(row.ids) == 5 for row in rows]] = float("inf")
        return out

    monkeypatch.setattr(Runner, "pooled", overflowing)
    assert call(monkeypatch, "embed", lines, "-m", model, "-o", tmp_path / "o.npy", *BLOCK) == 1
    assert "vector of record 0 is not finite" in one_line(capsys)


def read_table(path: Path) -> list[dict]:
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()


@pytest.mark.parametrize("to", ["jsonl", "csv", "parquet"])
def test_classify(tmp_path: Path, monkeypatch, to: str) -> None:
    folder = tiny_model(tmp_path / "model", "BertForSequenceClassification", **LABELS)
    out = tmp_path / f"out.{to}"
    source = write_input(tmp_path, "csv")
    arguments = ("classify", source, "--column", "body", "--id-column", "id", "-m", folder)
    if to == "parquet":
        pytest.importorskip("pyarrow")
    assert call(monkeypatch, *arguments, "-o", out, *BLOCK) == 0
    encoder = TextEncoder.from_pretrained(folder)
    blocks = encoder.classify_stream(TEXTS, block_size=4)
    expected = [found for block in blocks for found in block]
    rows = read_table(out)
    assert [row["id"] for row in rows] == [f"T{number}" for number in range(len(TEXTS))]
    for row, found in zip(rows, expected, strict=True):
        assert row["label"] == found.label and float(row["probability"]) == found.probability
        if to == "csv":
            given = {name: float(row[f"p({name})"]) for name in found.probabilities}
        else:
            given = row["probabilities"]
            assert row["labels"] == list(found.labels)
        assert given == found.probabilities


@pytest.mark.parametrize(("to", "strategy"), [("jsonl", ""), ("csv", "none"), ("parquet", "max")])
def test_tag(tmp_path: Path, monkeypatch, to: str, strategy: str) -> None:
    folder = tiny_model(tmp_path / "model", "BertForTokenClassification", **LABELS)
    out = tmp_path / f"out.{to}"
    if to == "parquet":
        pytest.importorskip("pyarrow")
    source = write_input(tmp_path, "jsonl")
    arguments = ("tag", source, "--column", "body", "-m", folder, "-o", out, *BLOCK)
    if strategy:
        arguments = (*arguments, "--aggregation-strategy", strategy)
    assert call(monkeypatch, *arguments) == 0
    options = {"aggregation_strategy": strategy} if strategy else {}
    blocks = TextEncoder.from_pretrained(folder).tag_stream(TEXTS, block_size=4, **options)
    expected = [
        (number, entity.label, entity.text, entity.start, entity.stop, entity.probability)
        for number, found in enumerate(found for block in blocks for found in block)
        for entity in found
    ]
    assert len(expected) > 3
    rows = read_table(out)
    if to == "csv":
        given = [
            (
                *(int(row["id"]), row["label"], row["text"]),
                *(int(row["start"]), int(row["stop"]), float(row["probability"])),
            )
            for row in rows
        ]
    else:
        assert len(rows) == len(TEXTS)
        given = [(row["id"], *entity.values()) for row in rows for entity in row["entities"]]
    assert given == expected
    for number, _, text, start, stop, _ in given:
        assert TEXTS[number][start:stop] == text
    assert call(monkeypatch, *arguments, "--aggregation-strategy", "mean") == 2


def test_odd_ids(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Half of a surrogate pair is written as it came; ids of two kinds don't fit parquet."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"id": "\\ud800 ü", "text": "a \\udc00"}\n{"id": 7, "text": "b"}\n')
    arguments = ("embed", path, "--id-column", "id", "-m", model)
    assert call(monkeypatch, *arguments, "-o", out) == 0
    assert read_output(out)[0] == ["\ud800 ü", 7]
    pytest.importorskip("pyarrow")
    path.write_text('{"id": "one", "text": "a"}\n{"id": 7, "text": "b"}\n')
    capsys.readouterr()
    assert call(monkeypatch, *arguments, "-o", tmp_path / "out.parquet") == 1
    assert "the ids don't fit one column of parquet" in one_line(capsys)


def test_a_terminal_sees_progress(model: Path, lines: Path, tmp_path: Path, monkeypatch) -> None:
    shown = []
    monkeypatch.setattr(
        sys, "stderr", SimpleNamespace(isatty=lambda: True, write=shown.append, flush=lambda: None)
    )
    arguments = ("embed", lines, "-m", model, *BLOCK)
    assert call(monkeypatch, *arguments, "-o", tmp_path / "out.npy") == 0
    assert "10/10" in "".join(shown)
    shown.clear()
    assert call(monkeypatch, *arguments, "-o", tmp_path / "quiet.npy", "--quiet") == 0
    assert shown == []
