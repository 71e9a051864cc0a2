"""``embed`` is stopped, killed or out of room: nothing is half-written, and it can be resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
from cli_runs import BLOCK, Stop, call, keep_threads, lines, model, one_line, tiny_model

from encoder_fast import TextEncoder

__all__ = ["keep_threads", "lines", "model"]  # fixtures

# of the texts that are longer than the model takes
pytestmark = pytest.mark.filterwarnings("ignore:.* were cut")


@pytest.mark.parametrize("to", ["npy", "jsonl", "parquet"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_and_resumed(
    model: Path, lines: Path, tmp_path: Path, monkeypatch, capsys, to: str, after: int
) -> None:
    """The same bytes as in one go, whenever the interruption came."""
    if to == "parquet":
        pytest.importorskip("pyarrow")
    arguments = ("embed", lines, "-m", model, *BLOCK)
    whole, out = tmp_path / f"whole.{to}", tmp_path / f"out.{to}"
    assert call(monkeypatch, *arguments, "-o", whole) == 0
    Stop(monkeypatch, after, KeyboardInterrupt())
    capsys.readouterr()
    assert call(monkeypatch, *arguments, "-o", out) == 130
    message = one_line(capsys)
    assert not out.exists()
    folder = tmp_path / f"out.{to}.unfinished"
    if after == 0:
        assert message == "encoder-fast: interrupted\n" and not folder.exists()
    else:
        assert f"{4 * after} of 10 records are kept" in message
        assert call(monkeypatch, *arguments, "-o", out) == 1
        assert "--resume goes on with it" in one_line(capsys)
    assert call(monkeypatch, *arguments, "-o", out, "--resume") == 0
    said = capsys.readouterr().err
    assert (f"going on after {4 * after} of 10" in said) == (after > 0)
    # those of the first run count too
    assert "1 of 10 texts" in said
    assert out.read_bytes() == whole.read_bytes()
    assert not folder.exists()


ROOT = Path(__file__).parents[1]


def of_many(folder: Path, model: Path, *more: object) -> list[str]:
    """The arguments of a run that takes a second or so, in ``folder``, to ``out.npy`` there."""
    many = folder / "many.txt"
    many.write_text("".join("a b c " * (i * 7 % 13) + "\n" for i in range(1500)))
    out = folder / "out.npy"
    arguments = ["embed", many, "-m", model, "-o", out, "--block-size", 20, "--threads", 1, *more]
    return list(map(str, arguments))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run that nothing interrupts writes."""
    folder = tmp_path_factory.mktemp("whole")
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(monkeypatch, *of_many(folder, model, "-q")) == 0
    torch.set_num_threads(before)
    return (folder / "out.npy").read_bytes()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_process_that_is_ended(
    model: Path, whole: bytes, tmp_path: Path, monkeypatch, how: int
) -> None:
    arguments = of_many(tmp_path, model)
    command = [sys.executable, "-m", "encoder_fast.cli", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT)
    log = tmp_path / "out.npy.unfinished" / "log"
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(how)
    said = process.communicate(timeout=60)[1].decode()
    assert not (tmp_path / "out.npy").exists() and log.exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert said.startswith("encoder-fast: interrupted; ") and said.count("\n") == 1, said
    assert call(monkeypatch, *arguments, "--resume") == 0
    assert (tmp_path / "out.npy").read_bytes() == whole


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)
from encoder_fast.cli import main
main()
"""


def test_a_full_disk(model: Path, whole: bytes, tmp_path: Path, monkeypatch, capsys) -> None:
    """One line, what was there before is whole, and the run goes on once there is room."""
    arguments, out = of_many(tmp_path, model, "--overwrite"), tmp_path / "out.npy"
    out.write_bytes(b"an earlier result")
    command = [sys.executable, "-c", LIMITED, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 1
    assert process.stderr.startswith("encoder-fast: ") and process.stderr.count("\n") == 1
    assert "File too large" in process.stderr and "are kept in" in process.stderr
    assert out.read_bytes() == b"an earlier result"
    # both: the old result is replaced, and what was kept is gone on with
    assert call(monkeypatch, *arguments, "--resume") == 0
    assert "going on after" in capsys.readouterr().err
    assert out.read_bytes() == whole


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")


@needs_full
def test_a_full_standard_output(model: Path, lines: Path) -> None:
    command = [sys.executable, "-m", "encoder_fast.cli", "embed", lines, "-m", model, "-o", "-"]
    with open("/dev/full", "w") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.returncode == 1
    assert process.stderr == "encoder-fast: -: No space left on device\n"


@needs_full
def test_a_full_device(model: Path, lines: Path, monkeypatch, capsys) -> None:
    arguments = ("embed", lines, "-m", model, "-o", "/dev/full", "--format", "jsonl")
    assert call(monkeypatch, *arguments) == 1
    assert one_line(capsys) == "encoder-fast: /dev/full: No space left on device\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("input", "input was 10 records"),
        ("model", "model was SHA-256"),
        ("--normalize", "normalize was None, and is True now"),
        ("--threads", "threads was"),
        ("damage", "is damaged"),
    ],
)
def test_resumed_with_something_else(
    model: Path, lines: Path, tmp_path: Path, monkeypatch, capsys, change: str, message: str
) -> None:
    out = tmp_path / "out.npy"
    mine = tiny_model(tmp_path / "mine")
    arguments = ["embed", lines, "-m", mine, "-o", out, *BLOCK]
    Stop(monkeypatch, 1, KeyboardInterrupt())
    assert call(monkeypatch, *arguments) == 130
    if change == "input":
        lines.write_text(lines.read_text("utf-8").replace("h e l l o", "h e l l"), "utf-8")
    elif change == "model":
        tiny_model(mine, seed=1)
    elif change == "damage":
        (tmp_path / "out.npy.unfinished" / "run.json").write_text("{")
    else:
        more = [torch.get_num_threads() + 1] if change == "--threads" else []
        arguments += [change, *more]
    capsys.readouterr()
    assert call(monkeypatch, *arguments, "--resume") == 1
    assert message in one_line(capsys)
    # refused, and not thrown away
    assert (tmp_path / "out.npy.unfinished" / "parts").stat().st_size > 0
    assert call(monkeypatch, *arguments, "--overwrite") == 0
    assert np.load(out).shape == (10, 48)


def test_half_a_part_is_dropped(model: Path, lines: Path, tmp_path: Path, monkeypatch) -> None:
    """What a crash of the machine may leave: bytes without a line, or half a line."""
    whole, out = tmp_path / "whole.npy", tmp_path / "out.npy"
    arguments = ("embed", lines, "-m", model, *BLOCK)
    assert call(monkeypatch, *arguments, "-o", whole) == 0
    Stop(monkeypatch, 2, KeyboardInterrupt())
    assert call(monkeypatch, *arguments, "-o", out) == 130
    folder = tmp_path / "out.npy.unfinished"
    log = (folder / "log").read_text()
    (folder / "log").write_text(log[:-5])
    with open(folder / "parts", "ab") as parts:
        parts.write(b"torn")
    assert call(monkeypatch, *arguments, "-o", out, "--resume") == 0
    assert out.read_bytes() == whole.read_bytes()


def test_one_run_at_a_time(model: Path, lines: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    import fcntl

    folder = tmp_path / "out.npy.unfinished"
    folder.mkdir()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call(monkeypatch, "embed", lines, "-m", model, "-o", tmp_path / "out.npy") == 1
        capsys.readouterr()
        for option in ("--resume", "--overwrite"):
            arguments = ("embed", lines, "-m", model, "-o", tmp_path / "out.npy", option)
            assert call(monkeypatch, *arguments) == 1
            assert "in use by another run" in one_line(capsys)


def test_a_smaller_budget_is_kept(model: Path, lines: Path, tmp_path: Path, monkeypatch) -> None:
    """After memory ran out, a run that goes on makes the batches that the first would have."""
    out = tmp_path / "out.npy"
    # the first batch fails and comes again as two; then a block, and the end
    Stop(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    arguments = ("embed", lines, "-m", model, "-o", out, *BLOCK)
    with monkeypatch.context() as inner:
        Stop(inner, 3, KeyboardInterrupt())
        assert call(monkeypatch, *arguments) == 130
    entry = json.loads((tmp_path / "out.npy.unfinished" / "log").read_text().splitlines()[-1])
    assert entry["tokens_per_batch"] < 4096
    seen = []
    original = TextEncoder.tokens_per_batch.fset

    def spy(encoder: TextEncoder, tokens: int) -> None:
        seen.append(tokens)
        original(encoder, tokens)

    monkeypatch.setattr(
        TextEncoder, "tokens_per_batch", property(TextEncoder.tokens_per_batch.fget, spy)
    )
    assert call(monkeypatch, *arguments, "--resume") == 0
    assert seen == [entry["tokens_per_batch"]]
