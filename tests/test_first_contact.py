"""The first quarter of an hour on a GPU, dry: its steps start, and its log survives what fails."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
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
    # What is built is not replaced under a test, and figures are taken when nothing else runs.
    assert {step.name for step in todo if step.alone} == {"kernels", "bench"}
    # log.txt, the record, and one that is being written
    assert len({step.file for step in todo}) + 3 <= 8


def test_the_table_of_steps_is_the_docs() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    steps = first_contact.steps(Path())
    assert table == [(s.name, str(s.predicted), str(s.limit)) for s in steps]


@pytest.mark.parametrize("name", ["kernels", "triton", "memcheck", "bench"])
def test_a_step_starts(name: str, tmp_path: Path) -> None:
    """Each program takes the step's words; it is asked for its help in place of the work."""
    sanitizer = tmp_path / "compute-sanitizer"
    # It runs what comes behind its own options, or names these.
    sanitizer.write_text(
        '#!/bin/sh\ncase "$*" in --help) echo "  --kernel-name"; exit;; esac\n'
        'while test "$1" != -m; do last=$1; shift; done\nexec "$last" "$@"\n'
    )
    sanitizer.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": "."}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", environment["PATH"])
        (step,) = (s for s in first_contact.steps(tmp_path) if s.name == name)
    if name == "memcheck":
        assert "--kernel-name" in step.command
    result = subprocess.run(
        [*step.command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sage" in result.stdout


def test_both_extensions_are_built_whatever_becomes_of_one(tmp_path: Path) -> None:
    """The one for the CPU also looks at modules and weights while a graph runs."""
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\necho "$@, cpu ${ENCODER_FAST_BUILD_CPU-}, cuda ${ENCODER_FAST_BUILD_CUDA-}"\n'
        'test "${ENCODER_FAST_BUILD_CPU-}" != 0 || exit 3\nsleep 0.2\necho built\n'
    )
    fake.chmod(0o755)
    (step,) = (s for s in first_contact.steps(tmp_path) if s.name == "build")
    environment = {**os.environ, "PYTHON": str(fake), "ENCODER_FAST_BUILD_CUDA": "1"}
    environment.pop("ENCODER_FAST_BUILD_CPU", None)
    result = subprocess.run(step.command, env=environment, capture_output=True, text=True)
    assert result.returncode == 3
    words = "setup.py -q build_ext --inplace"
    assert sorted(result.stdout.splitlines()) == [
        "built",
        f"{words}, cpu , cuda 0",
        f"{words}, cpu 0, cuda 1",
    ]


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_it_stops_its_steps(number: int, tmp_path: Path) -> None:
    program = "import os, time; print('number', os.getpid(), flush=True); time.sleep(60)"
    step = f"Step('long', 60, 1, [sys.executable, '-c', {program!r}], 'a')"
    code = (
        "import sys; from pathlib import Path; from bench import first_contact; "
        f"from bench.first_contact import Step; first_contact.steps = lambda out: [{step}]; "
        f"sys.argv = ['first_contact', {str(tmp_path)!r}]; sys.exit(first_contact.main())"
    )
    run = subprocess.Popen([PYTHON, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    output = tmp_path / "a.txt"
    while not (output.exists() and re.search(r"number \d+\n", output.read_text())):
        time.sleep(0.05)
    child = int(re.findall(r"number (\d+)", output.read_text())[0])
    # Whatever ends the session, such as a machine that takes its command back, ends the step.
    assert os.getsid(child) == os.getsid(run.pid)
    run.send_signal(number)
    assert run.wait() == 130
    assert not Path(f"/proc/{child}").exists()
    assert (tmp_path / "log.txt").read_text().endswith("stopped\n")
