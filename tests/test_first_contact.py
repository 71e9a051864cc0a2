"""The first quarter of an hour on a GPU, dry: its steps start, and its log survives what fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")

from bench import first_contact
from bench.first_contact import ROOT, Run, Step

PYTHON = sys.executable


def python(code: str) -> list[str]:
    return [PYTHON, "-c", code]


def test_limits_leave_time(tmp_path: Path) -> None:
    todo = first_contact.steps(tmp_path)
    in_turn = [step for step in todo if not step.beside]
    assert sum(step.limit for step in in_turn) <= 7.5 * 60
    # What runs beside the tests of models and graphs ends with them.
    names = [step.name for step in todo]
    later = todo[names.index("racecheck") + 1 : names.index("bench")]
    assert all(step.limit <= sum(other.limit for other in later) for step in todo if step.beside)
    assert all(step.predicted < step.limit for step in todo)
    assert todo[-1].alone, "figures are taken when nothing else runs"
    # log.txt, the record, and one that is being written
    assert len({step.file for step in todo}) + 3 <= 8


def test_the_table_of_steps_is_the_docs() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    steps = first_contact.steps(Path())
    assert table == [(s.name, str(s.predicted), str(s.limit)) for s in steps]


@pytest.mark.parametrize("name", ["build", "info", "kernels", "sweep", "memcheck", "bench"])
def test_a_step_starts(name: str, tmp_path: Path) -> None:
    """Each program takes the step's words; it is asked for its help in place of the work."""
    sanitizer = tmp_path / "compute-sanitizer"
    # It runs what comes behind its own options, or names these.
    sanitizer.write_text(
        '#!/bin/sh\ncase "$*" in --help) echo "  --kernel-regex"; exit;; esac\n'
        'while test "$1" != -m; do last=$1; shift; done\nexec "$last" "$@"\n'
    )
    sanitizer.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": "."}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", environment["PATH"])
        (step,) = (s for s in first_contact.steps(tmp_path) if s.name == name)
    if name == "memcheck":
        assert "--kernel-regex" in step.command
    result = subprocess.run(
        [*step.command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sage" in result.stdout


def test_a_run_goes_on_and_tells(tmp_path: Path) -> None:
    steps = [
        Step("good", 20, 1, python("print('fine')"), "a"),
        Step("beside", 20, 1, python("print('at my side')"), "b", beside=True),
        Step("broken", 20, 1, python("print('so far'); raise SystemExit(3)"), "a"),
        Step("absent", 20, 1, ["/no/such/program"], "a"),
        Step("slow", 1, 1, python("print('begun', flush=True); import time; time.sleep(60)"), "a"),
        Step("last", 20, 1, python("import os; print(os.environ['WORD'])"), "a", {"WORD": "hi"}),
    ]
    run = Run(tmp_path)
    run.all(steps)
    assert run.failed == ["broken", "absent", "slow"]
    log = (tmp_path / "log.txt").read_text()
    ends = dict(re.findall(r"\] (\w+): (rc .*)", log))
    assert re.fullmatch(r"rc 0, \d s, fine", ends["good"])
    assert ends["beside"].endswith("at my side") and ends["last"].endswith("hi")
    assert ends["broken"].startswith("rc 3,") and ends["broken"].endswith("so far")
    assert ends["absent"].startswith("rc 127,") and "/no/such/program" in ends["absent"]
    assert ends["slow"].startswith("rc 124,")
    assert log.count("started, at most") == len(steps)
    assert "begun" in (tmp_path / "a.txt").read_text()


def test_a_step_that_does_not_end_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(p.pid, flush=True); p.wait()"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_contact, "_GRACE", 0.2)
        Run(tmp_path).all([Step("stuck", 2, 1, python(code), "a")])
    numbers = re.findall(r"^(\d+)$", (tmp_path / "a.txt").read_text(), re.MULTILINE)
    state = Path(f"/proc/{numbers[0]}/stat")
    assert not state.exists() or state.read_text().split(")")[1].split()[0] == "Z"
