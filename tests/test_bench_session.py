"""A run's session: who takes part, who is left out and why, and what ends a run."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("rich")
if torch.cuda.is_available():
    pytest.skip("a GPU is measured, not imitated", allow_module_level=True)

from bench import record, timing
from bench.cli import app
from bench.contestant import Entry, Ready, Unavailable
from bench.machine import find_machine
from bench.session import LostContextError, Session
from encoder_fast.parity import ParityRow

MACHINE = find_machine(fake=True)
RIGHT = ParityRow("out", 1e-7, 1e-7, 1e-7)


def session(tmp_path: Path) -> Session:
    writer = record.RecordWriter(MACHINE, "test", quick=True, folder=tmp_path)
    made = Session(MACHINE, writer, quick=True)
    made.begin("kernels")
    return made


def hold(running: Session, *entries: Entry) -> list[record.Row]:
    limits = timing.Limits(most=2, fewest=1, seconds=1)
    running.hold("kernels", "case", {"tokens": 1}, entries, timing.race_kernels, limits)
    return list(record.read(running.writer.path).rows)


def test_wrong_numbers_get_no_speed(tmp_path: Path) -> None:
    running = session(tmp_path)
    wrong = Ready([lambda: None], replace(RIGHT, error=1.0))
    row, other = hold(
        running, Entry("ours", lambda: wrong, ("kernels/",)), Entry("peer", lambda: wrong)
    )
    assert row.status == other.status == record.WRONG
    assert row.seconds is None and other.seconds is None
    assert len(running.broken) == 1 and "ours" in running.broken[0]


def test_who_fails_does_not_end_the_run(tmp_path: Path) -> None:
    def explode() -> Ready:
        raise RuntimeError("out of luck\nand more")

    def stay_away() -> Ready:
        raise Unavailable("not installed")

    running = session(tmp_path)
    rows = hold(
        running,
        Entry("broken", explode),
        Entry("absent", stay_away),
        Entry("fine", lambda: Ready([lambda: None], RIGHT)),
    )
    found = {row.contestant: (row.status, row.reason) for row in rows}
    assert found == {
        "broken": ("failed", "RuntimeError: out of luck"),
        "absent": ("skipped", "not installed"),
        "fine": ("ok", ""),
    }
    assert not running.broken  # of ours nothing failed


def on_a_gpu(tmp_path: Path) -> tuple[Session, list[str], list[Entry]]:
    """A session as on a GPU, who was built there, and the contestants of a case."""
    running, built = session(tmp_path), []
    running.machine = SimpleNamespace(kind="gpu", is_gpu=True, has_lost_context=False)  # type: ignore[assignment]

    def entry(label: str, **facts: Any) -> Entry:
        def prepare() -> Ready:
            built.append(label)
            return Ready([lambda: None], RIGHT)

        return Entry(label, prepare, **facts)

    entries = [
        entry("ours", sources=("kernels/",)),
        entry("ours too", sources=("csrc/",)),
        entry("peer"),
        entry("compiler", compiles=True),
    ]
    return running, built, entries


def race_for_nothing(machine: Any, calls: Any, limits: timing.Limits) -> dict[str, timing.Times]:
    return {label: timing.Times((1.0,)) for label in calls}


def test_on_a_gpu_who_compiles_comes_last_beside_ours(tmp_path: Path) -> None:
    running, built, entries = on_a_gpu(tmp_path)
    limits = timing.Limits(1, 1, 1)
    running.hold("kernels", "case", {}, entries, race_for_nothing, limits)
    assert built == ["ours", "ours too", "peer"]
    running.compiling = True
    running.begin("kernels")
    running.hold("kernels", "case", {}, entries, race_for_nothing, limits)
    running.hold("kernels", "other", {}, entries[:3], race_for_nothing, limits)
    assert built[3:] == ["ours", "compiler"]
    rows = record.read(running.writer.path).rows
    assert [row.contestant for row in rows] == ["ours", "ours too", "peer", "compiler"]
    running._deadline = 0
    running.hold("kernels", "third", {}, entries, race_for_nothing, limits)
    assert len(built) == 5, "with no time left nobody is built"
    last = record.read(running.writer.path).rows[-1]
    assert (last.contestant, last.status) == ("compiler", record.SKIPPED)


def test_a_compiler_is_stopped_when_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, _, (ours, *_) = on_a_gpu(tmp_path)
    running.compiling = True
    monkeypatch.setattr("bench.session._COMPILE_SECONDS", {"gpu": 0})
    running._deadline = time.perf_counter() + 0.2

    def search() -> Ready:
        time.sleep(30)
        raise AssertionError("nobody stopped it")

    slow = Entry("slow", search, compiles=True)
    running.hold("kernels", "case", {}, [ours, slow], race_for_nothing, timing.Limits(1, 1, 1))
    (row,) = record.read(running.writer.path).rows
    assert (row.contestant, row.status) == ("slow", record.SKIPPED)
    assert "still compiling" in row.reason


def test_a_lost_context_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access all others would fail, and stand in the record as failed."""
    running, built, entries = on_a_gpu(tmp_path)

    def explode() -> Ready:
        running.machine.has_lost_context = True  # type: ignore[misc]
        raise RuntimeError("an illegal memory access")

    limits = timing.Limits(1, 1, 1)
    broken = [entries[0], Entry("broken", explode, ("csrc/",)), *entries[1:]]
    with pytest.raises(LostContextError, match="case, broken: RuntimeError: an illegal"):
        running.hold("kernels", "case", {}, broken, race_for_nothing, limits)
    assert built == ["ours"]
    (row,) = record.read(running.writer.path).rows
    assert (row.contestant, row.status) == ("broken", record.FAILED)

    def hold(self: Session, *_: Any, **__: Any) -> None:
        raise LostContextError("case, broken: RuntimeError: an illegal memory access")

    monkeypatch.setattr(Session, "hold", hold)
    result = CliRunner().invoke(app, ["kernels", "--fake", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "the CUDA context is lost: case, broken" in result.output


def test_a_race_that_fails_costs_its_case_alone(tmp_path: Path) -> None:
    def fall(*_: Any) -> dict[str, timing.Times]:
        raise RuntimeError("out of memory")

    running, _, entries = on_a_gpu(tmp_path)
    running.hold("kernels", "case", {}, entries[:3], fall, timing.Limits(1, 1, 1))
    running.hold("kernels", "next", {}, entries[:3], race_for_nothing, timing.Limits(1, 1, 1))
    rows = record.read(running.writer.path).rows
    assert [row.status for row in rows] == [record.FAILED] * 3 + [record.OK] * 3
    assert "out of memory" in rows[0].reason
    assert len(running.broken) == 2


def test_a_profiler_that_is_refused_costs_no_times(tmp_path: Path) -> None:
    def refuse(*_: Any) -> dict[str, Any]:
        raise RuntimeError("CUPTI: not permitted")

    running, _, entries = on_a_gpu(tmp_path)
    limits = timing.Limits(1, 1, 1)
    running.hold("latency", "case", {}, entries[2:3], race_for_nothing, limits, refuse)
    (row,) = record.read(running.writer.path).rows
    assert row.status == record.OK and row.seconds is not None


def test_time_that_is_up_is_said(tmp_path: Path) -> None:
    running = session(tmp_path)
    running._deadline = 0
    assert not running.turn("kernels", "case", {})
    (row,) = record.read(running.writer.path).rows
    assert (row.status, row.reason) == (record.SKIPPED, "the suite's time is up")
