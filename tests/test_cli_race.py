"""How ``demo`` and ``bench`` time their contestants."""

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from berts import DEVICE

pytest.importorskip("typer")
pytest.importorskip("rich")
from cli_runs import tiny_model

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


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU all contestants are in one process")
def test_contestants_have_a_process_each(model: Path) -> None:
    checkpoint = Checkpoint(str(model), "")
    contestants = [Contestant(name, torch.float32, "eager", name == "b") for name in "ab"]
    before = set(multiprocessing.active_children())
    with ready(checkpoint, contestants) as runners:
        processes = set(multiprocessing.active_children()) - before
        assert len(processes) == 2
        inputs = checkpoint.batch([4, 9])
        assert all(0 < run(inputs) < 60 for run in runners.values())
        with pytest.raises(ValueError, match="input_ids"):
            runners["a"]({"nonsense": torch.zeros(1)})
        # and what went wrong in one call is over with it
        assert runners["a"](inputs) > 0
        for process in processes:
            process.kill()
        with pytest.raises(UserError, match="b: its process ended by itself"):
            runners["b"](inputs)
    assert set(multiprocessing.active_children()) <= before


def test_on_other_devices_than_a_cpu_all_are_here(model: Path) -> None:
    checkpoint = Checkpoint(str(model), "")
    checkpoint.device = "meta"
    before = set(multiprocessing.active_children())
    with ready(checkpoint, [Contestant("a", torch.float32, "eager")]) as runners:
        assert set(multiprocessing.active_children()) <= before
        inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long, device="meta")}
        assert runners["a"](inputs) > 0


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
