"""How ``demo`` and ``bench`` time their contestants."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from berts import DEVICE

pytest.importorskip("typer")
pytest.importorskip("rich")
from cli_runs import tiny_model

from encoder_fast.cli import race as race_module
from encoder_fast.cli.checkpoint import Checkpoint
from encoder_fast.cli.errors import UserError
from encoder_fast.cli.measuring import BatchResult, Contestant, Timing, mixed_lengths
from encoder_fast.cli.race import Rounds, Runner, race, ready, second_call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "encoder")


def test_a_race() -> None:
    calls = []

    def runner(name: str) -> Runner:
        return lambda inputs: calls.append(name) or len(calls)

    runners = {name: runner(name) for name in "ab"}
    timings = race(runners, {}, Rounds(3, 2, 1000))
    # once to prepare, then in turn
    assert "".join(calls) == "ab" + "ab" * 3
    assert timings == [Timing("a", (3, 5, 7)), Timing("b", (4, 6, 8))]
    calls.clear()
    race(runners, {}, Rounds(30, 2, 0))
    assert "".join(calls) == "ab" + "ab" * 2


def children() -> set[multiprocessing.process.BaseProcess]:
    return set(multiprocessing.active_children())


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU all contestants are in one process")
def test_contestants_have_a_process_each(model: Path) -> None:
    checkpoint = Checkpoint(str(model), "")
    contestants = [Contestant(name, torch.float32, "eager", name == "b") for name in "ab"]
    before = children()
    with ready(checkpoint, contestants) as runners:
        processes = children() - before
        assert len(processes) == 2
        inputs = checkpoint.batch([4, 9])
        assert all(0 < run(inputs) < 60 for run in runners.values())
        with pytest.raises(IndexError):
            runners["a"]({"input_ids": torch.tensor([[10**6]])})
        # and what went wrong in one call is over with it
        assert runners["a"](inputs) > 0
        for process in processes:
            process.kill()
            process.join()
        for label, run in runners.items():
            with pytest.raises(UserError, match=f"{label}: its process ended by itself"):
                run(inputs)
    assert children() <= before


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU all contestants are in one process")
def test_an_interrupt_does_not_wait_for_a_call(model: Path) -> None:
    checkpoint = Checkpoint(str(model), "")
    before = children()
    one = Contestant("a", torch.float32, "eager")
    with pytest.raises(KeyboardInterrupt), ready(checkpoint, [one]):
        (process,) = children() - before
        os.kill(process.pid, signal.SIGSTOP)  # as in a call that never ends
        raise KeyboardInterrupt
    assert children() <= before


ORPHAN = """
import os, sys, torch
from multiprocessing import active_children
from encoder_fast.cli import race as race_module
from encoder_fast.cli.checkpoint import Checkpoint
from encoder_fast.cli.measuring import Contestant
from encoder_fast.cli.race import ready

if __name__ == "__main__":
    with ready(Checkpoint(sys.argv[1], ""), [Contestant("a", torch.float32, "eager")]):
        print(active_children()[0].pid, flush=True)
        os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")
def test_contestants_end_with_who_started_them(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    run = subprocess.run(
        [sys.executable, str(script), str(model)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert run.returncode == -9, run.stderr
    status = Path("/proc") / run.stdout.strip() / "status"
    deadline = time.monotonic() + 30
    # nobody but init may be there to take note of its end
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, "a contestant outlives the demo"
        time.sleep(0.1)


def threads_at_work(path: str, option: str) -> Checkpoint:
    """Stands for :class:`Checkpoint` in :func:`_serve`."""
    raise UserError(str(torch.get_num_threads()))


def test_contestants_have_the_threads_that_were_asked_for(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, where what they load can be looked at."""
    said = []
    monkeypatch.setattr(race_module, "Checkpoint", threads_at_work)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    before = torch.get_num_threads()
    one = Contestant("a", torch.float32, "eager")
    try:
        race_module._serve(SimpleNamespace(send=said.append), str(model), one, before + 3)
        (error,) = said
        assert str(error) == str(before + 3)
    finally:
        torch.set_num_threads(before)


def test_errors_of_classes_that_can_not_be_made_anew() -> None:
    class Awkward(Exception):
        def __init__(self, one: str, two: str) -> None:
            super().__init__(f"{one} and {two}")

    assert repr(race_module._portable(Awkward("this", "that"))) == (
        "RuntimeError('Awkward: this and that')"
    )
    error = UserError("no model", 3)
    assert race_module._portable(error) is error


def test_on_other_devices_than_a_cpu_all_are_here(model: Path) -> None:
    checkpoint = Checkpoint(str(model), "")
    checkpoint.device = "meta"
    before = children()
    with ready(checkpoint, [Contestant("a", torch.float32, "eager")]) as runners:
        assert list(runners) == ["a"] and children() <= before


def test_a_contestant_that_can_not_be_loaded(model: Path) -> None:
    wrong = Contestant("wrong", torch.float32, "no such attention")
    with (
        pytest.raises(UserError, match="no such attention"),
        ready(Checkpoint(str(model), "", device=DEVICE), [wrong]),
    ):
        pass


def test_a_compiler_that_fails() -> None:
    def fails(**_: object) -> None:
        raise torch._dynamo.exc.Unsupported("no compiler")

    inputs = {"x": torch.zeros(1)}
    compiled = Contestant("compiled", torch.float32, "sdpa", is_compiled=True)
    with pytest.raises(UserError, match="--compile: no compiler"):
        second_call(fails, compiled, inputs)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        second_call(fails, replace(compiled, is_compiled=False), inputs)


def test_the_second_call_counts() -> None:
    waits = iter((0.5, 0.0))
    one = Contestant("one", torch.float32, "eager")
    seconds = second_call(lambda x: time.sleep(next(waits)), one, {"x": torch.zeros(1)})
    assert seconds < 0.4
    assert next(waits, None) is None


def test_what_times_say() -> None:
    slow, fast = Timing("slow", (4.0, 2.0, 3.0, 5.0, 6.0)), Timing("fast", (1.0,))
    assert slow.median == 4 and slow.spread == pytest.approx((5 - 3) / 4)
    batch = BatchResult("b", (10, 5), (slow, fast), "slow")
    assert batch.tokens == 15 and batch.padding == 0.25
    assert batch.speedup(fast) == 4 and batch.speedup(slow) == 1


def test_mixed_lengths() -> None:
    lengths = mixed_lengths(32, 256)
    assert lengths == sorted(lengths) and lengths[0] == 8 and lengths[-1] == 256
    assert 0.4 < 1 - sum(lengths) / (256 * 32) < 0.6
    assert mixed_lengths(1, 3) == [3]
