"""Verdicts, the report and the parity page, from made-up records."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("matplotlib")

from bench import compare, record
from bench.cli import app
from bench.machine import Machine
from bench.models import SIZES, ModelCase
from bench.op_case import WIDTHS, OpCase
from bench.ops import facts_of
from bench.report.choice import choose
from bench.report.page import write_report
from bench.sources import fingerprints, sources_of_model, sources_of_op
from bench.timing import Times
from bench.workloads import Workload

MACHINE = Machine(torch.device("cpu"), "Some Processor", 2)
HALF, FULL = Workload("half", 16, 128), Workload("full", 16, 128)


def row(suite: str, case: str, who: str, seconds: float, facts: dict, **more: object) -> record.Row:
    """A row whose samples spread by 2% on either side."""
    ours = who.startswith("encoder_fast") or who == "TextEncoder"
    taken = record.timed(Times(tuple(seconds * f for f in (0.97, 0.98, 1.0, 1.02, 1.03))))
    values = {"parity": {"error": 2e-7, "original_error": 1e-7, "floor": 1e-7}, **taken, **more}
    return record.Row(suite, case, who, ours, record.OK, facts=facts, **values)


def rows(ours: float = 1.0, peers: float = 1.0) -> list[record.Row]:
    """A run in which our times and the peers' are so many times as long as in another."""
    made = []
    for size, workload in (("MiniLM-L6", HALF), ("MiniLM-L6", FULL), ("BERT-base", HALF)):
        case = ModelCase(SIZES[size], workload, torch.float32)
        name, facts = case.name(MACHINE), case.facts(MACHINE)
        sources = sources_of_model("cpu")
        made.append(
            row("models", name, "encoder_fast", 0.5 * ours, facts, sources=sources, memory_bytes=9)
        )
        for who, seconds in (("Hugging Face eager", 1.4), ("Hugging Face SDPA", 1.0)):
            made.append(row("models", name, who, seconds * peers, facts))
        made.append(row("models", name, "ONNX Runtime", 0.4 * peers, facts))
    for length in (16, 128):
        case = ModelCase(SIZES["MiniLM-L6"], Workload("full", 1, length), torch.float32)
        name, facts = case.name(MACHINE), case.facts(MACHINE)
        for who in ("encoder_fast", "Hugging Face SDPA"):
            sources = sources_of_model("cpu") if who == "encoder_fast" else ()
            taken = row("latency", name, who, length / 1e3, facts, sources=sources)
            made.append(replace(taken, outside_kernels=0.3))
    facts = {"texts": 10, "tokens": 200}
    text_sources = ("encoder_fast/text/",)
    made.append(row("texts", "queries", "TextEncoder", 0.1, facts, sources=text_sources))
    made.append(row("texts", "queries", "sentence-transformers", 0.2, facts))
    case = OpCase("attention", WIDTHS["base"], HALF, torch.float32)
    sources = sources_of_op("attention", "cpu")
    made.append(
        row("kernels", case.name, "encoder_fast cpu", 0.01, facts_of(case), sources=sources)
    )
    made.append(row("kernels", case.name, "SDPA, padded", 0.02, facts_of(case)))
    made.append(record.Row("models", "x", "OpenVINO", False, record.SKIPPED, "is not installed"))
    return made


def write(folder: Path, made: list[record.Row], date: str = "2026-01-01", **header: object) -> Path:
    writer = record.RecordWriter(MACHINE, "all", quick=False, folder=folder)
    writer.set_roofs({"copy": 2e10, "fp32": 2e11})
    writer.header |= {"date": date, "commit": "0123456789ab", **header}
    writer.path = folder / f"{date}.json"
    writer.rows = list(made)
    writer.finish()
    return writer.path


def verdicts(tmp_path: Path, before: list[record.Row], after: list[record.Row]) -> list[str]:
    a, b = (write(tmp_path / name, made) for name, made in (("a", before), ("b", after)))
    found = compare.compare(record.read(a), record.read(b))
    return [verdict.word for verdict in found.verdicts if verdict.key[0] == "models"]


def test_round_trip(tmp_path: Path) -> None:
    made = rows()
    path = write(tmp_path, made)
    assert list(record.read(path).rows) == made
    for text in ("{}", "[]", "{", '{"schema": 99}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=path.name):
            record.read(path)


@pytest.mark.parametrize(
    ("ours", "peers", "word"),
    [
        pytest.param(1.0, 1.0, "same", id="nothing-moved"),
        pytest.param(0.8, 1.0, "faster", id="faster"),
        pytest.param(1.25, 1.0, "slower", id="slower"),
        pytest.param(1.02, 1.0, "same", id="within-noise"),
        pytest.param(1.5, 1.5, "same", id="a-busier-machine"),
        pytest.param(1.0, 1.5, "faster", id="as-fast-on-a-busier-machine"),
    ],
)
def test_verdict(tmp_path: Path, ours: float, peers: float, word: str) -> None:
    # every peer must drift, those of the other suites too
    after = [r if r.ours or r.suite == "models" else slower(r, peers) for r in rows(ours, peers)]
    assert set(verdicts(tmp_path, rows(), after)) == {word}


def slower(taken: record.Row, factor: float) -> record.Row:
    if taken.seconds is None:
        return taken
    return replace(taken, **record.timed(Times(tuple(s * factor for s in taken.samples))))


def test_peers_that_scatter_make_verdicts_careful(tmp_path: Path) -> None:
    after = [
        r if r.ours else slower(r, factor)
        for r, factor in zip(rows(0.9), (0.6, 1.0, 1.6) * 99, strict=False)
    ]
    assert set(verdicts(tmp_path, rows(), after)) == {"same"}


def test_unlike_machines_are_not_compared(tmp_path: Path) -> None:
    a = record.read(write(tmp_path / "a", rows()))
    header = {**a.header, "machine": {**a.header["machine"], "threads": 64}}
    with pytest.raises(ValueError, match="threads 2 and 64"):
        compare.compare(a, replace(a, header=header))
    with pytest.raises(ValueError, match="miniature"):
        compare.compare(a, replace(a, header={**a.header, "fake": True}))


def test_what_is_lost_is_named(tmp_path: Path) -> None:
    after = [r for r in rows() if r.contestant != "TextEncoder"]
    a, b = write(tmp_path / "a", rows()), write(tmp_path / "b", after, finished=False)
    result = CliRunner().invoke(app, ["compare", str(a), str(b)])
    assert result.exit_code == 0, result.output
    assert "no longer in B: texts, queries, TextEncoder" in result.output
    assert "0 faster, 0 slower, 6 same" in result.output


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp("report")
    write(root / "results" / MACHINE.slug, rows())
    return write_report(root / "results", root / "docs").read_text("utf-8"), root / "docs"


def test_first_screen_says_how_much_faster(report: tuple[str, Path]) -> None:
    first = report[0].splitlines()[:24]
    assert "| MiniLM-L6 | **2.00x** (0.80x) | **2.00x** (0.80x) |" in first
    assert any("Over 2 batches with padding" in line and "2.00 times" in line for line in first)


def test_slower_than_a_peer_is_shown(report: tuple[str, Path]) -> None:
    start = "| BERT-base (4 of 12 layers) | fp32 | 16 texts up to 128 tokens, 48% padding |"
    (line,) = [line for line in report[0].splitlines() if line.startswith(start)]
    assert "| **2.80x** | **2.00x** | 0.80x | ONNX Runtime |" in line


def test_pictures_exist_for_light_and_dark(report: tuple[str, Path]) -> None:
    text, docs = report
    shown = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert {Path(name).stem for name in shown} == {
        f"{name}-{theme}"
        for name in ("speed", "latency", "roofline")
        for theme in ("light", "dark")
    }
    for name in shown:
        assert (docs / name).stat().st_size > 1000
        assert (docs / name).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert not re.search(r"<dc:date>", (docs / name).read_text("utf-8"))


def test_report_has_every_section(report: tuple[str, Path]) -> None:
    for words in (
        "From strings to vectors",
        "One text and eight",
        "Single ops",
        "is not installed",
    ):
        assert words in report[0]
    assert "changed since" not in report[0] and "⚠" not in report[0]
    assert "No GPU timing has been recorded yet" in report[0]


def test_changed_sources_are_marked(tmp_path: Path) -> None:
    sources = {**fingerprints(), "encoder_fast/engine.py": "another"}
    write(tmp_path / "results" / MACHINE.slug, rows(), sources=sources)
    text = write_report(tmp_path / "results", tmp_path / "docs").read_text("utf-8")
    assert "has changed since it was measured**: `encoder_fast/engine.py`" in text
    assert "| MiniLM-L6 | **2.00x** (0.80x) ⚠ |" in text
    # the engine has no part in a single op
    (kernel,) = [line for line in text.splitlines() if line.startswith("| attention base half")]
    assert "⚠" not in kernel


def test_newest_record_of_each_case_counts(tmp_path: Path) -> None:
    folder = tmp_path / MACHINE.slug
    write(folder, rows(), "2026-01-01")
    texts = [row for row in rows(0.5) if row.suite == "texts"]
    write(folder, texts, "2026-01-02")
    # by a filter, or with texts of one's own
    others = [replace(row, case="mine x2") for row in texts]
    write(folder, others, "2026-01-03")
    write(folder, rows(0.1), "2026-01-04", quick=True)
    write(folder, rows(0.1), "2026-01-05", fake=True)
    skipped = [replace(row, status=record.SKIPPED, reason="no time") for row in texts]
    write(folder, skipped, "2026-01-06")
    (folder / "other.json").write_text('{"not": "ours"}')
    (device,) = choose(tmp_path, fingerprints())
    dates = {
        (suite, case): taken.header["date"][:10]
        for suite, cases in device.taken.items()
        for case, taken in cases.items()
    }
    assert set(dates.values()) == {"2026-01-01", "2026-01-02", "2026-01-03"}
    for (suite, case), date in dates.items():
        wanted = "2026-01-03" if case == "mine x2" else "2026-01-02"
        assert date == (wanted if suite == "texts" else "2026-01-01")
    assert {row.case for row in device.rows("texts")} == {row.case for row in [*texts, *others]}
    assert len(device.records()) == 3 and len(device.records("models")) == 1


def test_a_share_is_of_the_roofs_of_its_own_run(tmp_path: Path) -> None:
    folder = tmp_path / "results" / MACHINE.slug
    write(folder, rows(), "2026-01-01")
    later = [replace(r, case=f"later {r.case}") for r in rows() if r.suite == "kernels"]
    write(folder, later, "2026-01-02", roofs={"copy": 2e11, "fp32": 2e12})
    text = write_report(tmp_path / "results", tmp_path / "docs").read_text("utf-8")
    shares = re.findall(r"(later )?attention base half .*? (\d+)% of", text)
    assert [later for later, _ in shares] == ["", "later "]
    first, second = (int(share) for _, share in shares)
    assert second == pytest.approx(first / 10, abs=1)


def test_texts_are_held_against_the_fastest_peer_too(tmp_path: Path) -> None:
    texts = [row for row in rows() if row.suite == "texts"]
    small = replace(slower(texts[1], 0.75), contestant="sentence-transformers, batches of 8")
    write(tmp_path / "results" / MACHINE.slug, [*texts, small])
    text = write_report(tmp_path / "results", tmp_path / "docs").read_text("utf-8")
    (line,) = [line for line in text.splitlines() if "**TextEncoder**" in line]
    assert line.endswith("| 2.00x | 1.50x |")


def test_report_of_nothing_is_an_error(tmp_path: Path) -> None:
    words = ["report", "--results", str(tmp_path), "--docs", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "no record" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured, not imitated")
def test_parity_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick, on the CPU's own backend: the same lines of code as the whole page."""
    from bench import parity_page

    monkeypatch.setattr("bench.real.documents", lambda: ("texts", ["one"], ["a b", "c d"] * 6))
    machine = Machine(torch.device("cpu"), "Some Processor", 1)
    assert parity_page.write_page(machine, tmp_path / "parity.md", quick=True)
    text = (tmp_path / "parity.md").read_text("utf-8")
    assert re.search(r"\| MiniLM-L6 \| fp32 \| .* \| holds \|", text)
    assert "Error by layer in fp32" in text
    for section in ("## Labels", "## Retrieval", "## Batch-mates"):
        assert section in text
    assert "encoder_fast.errors" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured, not imitated")
def test_a_family_that_fails_fails_the_parity_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import parity_page

    def fail(*_: object) -> None:
        raise RuntimeError("a shape does not fit")

    monkeypatch.setattr(parity_page, "build", fail)
    monkeypatch.setattr(parity_page, "_SECTIONS", ())
    machine = Machine(torch.device("cpu"), "Some Processor", 1)
    assert not parity_page.write_page(machine, tmp_path / "parity.md", quick=True)
    assert "a shape does not fit" in (tmp_path / "parity.md").read_text("utf-8")
