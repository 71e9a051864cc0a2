"""What changes, breaks or stands in the way while ``embed`` runs: one line, and nothing is lost."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
from cli_runs import BLOCK, Stop, call, flipped, keep_threads, lines, model, one_line, tiny_model

from encoder_fast.cli import errors, job
from encoder_fast.cli.parts import Unfinished
from encoder_fast.cli.records import Source

__all__ = ["keep_threads", "lines", "model"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:.* were cut")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run over ``lines`` writes that nothing disturbs."""
    from cli_runs import TEXTS

    folder = tmp_path_factory.mktemp("whole")
    (folder / "lines.txt").write_text("".join(text + "\n" for text in TEXTS), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ("embed", folder / "lines.txt", "-m", model, "-q", *BLOCK)
        assert call(patch, *arguments, "-o", folder / "out.npy") == 0
    return (folder / "out.npy").read_bytes()


def between_readings(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Make a change when the input has been read once: while the model is loaded."""
    load = job.load_encoder

    def loaded(choice: object) -> object:
        change()
        return load(choice)

    monkeypatch.setattr(job, "load_encoder", loaded)


def edited(path: Path, *parts: str) -> None:
    path.write_text(path.read_text("utf-8").replace(*parts), "utf-8")


def renamed_over(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("b\n" * 10)
    other.replace(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: edited(path, "h e l l o", "h e l l"),
        lambda path: edited(path, "a b c", "b b c"),
        lambda path: edited(path, "i\n\n", "i\n"),
        lambda path: path.write_text(""),
        lambda path: path.write_bytes(path.read_bytes().replace(b"e l", b"e \xff")),
        lambda path: path.unlink(),
        renamed_over,
    ],
    ids=["last block", "first block", "shorter", "empty", "broken", "deleted", "renamed"],
)
def test_an_input_that_changes(
    model: Path, lines: Path, tmp_path: Path, monkeypatch, capsys, change: Callable[[Path], object]
) -> None:
    """Never vectors of another text than the one that was hashed; nothing wrong is kept."""
    between_readings(monkeypatch, lambda: change(lines))
    out = tmp_path / "out.npy"
    assert call(monkeypatch, "embed", lines, "-m", model, "-o", out, *BLOCK) == 1
    assert one_line(capsys) == f"encoder-fast: {lines} was changed while it was read\n"
    assert not list(tmp_path.glob("out*"))


def test_an_input_that_grows(
    model: Path, lines: Path, whole: bytes, tmp_path: Path, monkeypatch
) -> None:
    """As a log does: the records that were there at first."""

    def grow() -> None:
        with open(lines, "a") as file:
            file.write("more\nand \udcff".encode("utf-8", "replace").decode())

    between_readings(monkeypatch, grow)
    out = tmp_path / "out.npy"
    assert call(monkeypatch, "embed", lines, "-m", model, "-o", out, *BLOCK) == 0
    assert out.read_bytes() == whole


def test_an_input_that_changes_back(
    model: Path, lines: Path, whole: bytes, tmp_path: Path, monkeypatch, capsys
) -> None:
    """What an interrupted run kept of another text is found out by the one that goes on."""
    before, out = lines.read_bytes(), tmp_path / "out.npy"
    arguments = ("embed", lines, "-m", model, "-o", out, *BLOCK)
    with monkeypatch.context() as inner:
        between_readings(inner, lambda: edited(lines, "a b c", "b b c"))
        Stop(inner, 1, KeyboardInterrupt())
        assert call(inner, *arguments) == 130
    lines.write_bytes(before)
    capsys.readouterr()
    assert call(monkeypatch, *arguments, "--resume", "-q") == 1
    assert "was changed while it was read" in one_line(capsys)
    assert call(monkeypatch, *arguments, "--resume") == 0
    assert out.read_bytes() == whole


def test_a_finished_run_is_resumed(
    model: Path, lines: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """It is done, unless this is another command or input."""
    out, before = tmp_path / "out.npy", lines.read_bytes()
    arguments = ("embed", lines, "-o", out, *BLOCK, "--resume")
    assert call(monkeypatch, *arguments, "-m", model, "--threads", 1) == 0
    first = out.stat()
    capsys.readouterr()
    assert call(monkeypatch, *arguments, "-m", model, "--threads", 2) == 0
    assert one_line(capsys) == f"encoder-fast: {out} is done already\n"
    data = out.read_bytes()

    def refused(*more: object, model: Path = model) -> None:
        assert call(monkeypatch, *arguments, "-m", model, *more) == 1
        assert "out.npy exists and is not the result of this" in one_line(capsys)
        assert not (tmp_path / "out.npy.unfinished").exists()

    refused("--normalize")
    refused("--block-size", 5)
    refused("--format", "jsonl")
    refused(model=tiny_model(tmp_path / "other", seed=1))
    lines.write_bytes(before + b"more\n")
    refused()
    lines.write_bytes(before)
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    # in place, to the same size
    out.write_bytes(data[:-1] + b"\0")
    refused()
    out.unlink()
    out.write_bytes(data)
    assert call(monkeypatch, *arguments, "-m", model) == 1
    assert "out.npy exists: --overwrite replaces it" in one_line(capsys)
    assert call(monkeypatch, *arguments, "-m", model, "--overwrite") == 0
    assert out.read_bytes() == data


@pytest.mark.parametrize("name", ["lines.txt", "sub/../lines.txt", "hard"])
def test_an_output_is_not_its_input(
    model: Path, lines: Path, name: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "sub").mkdir()
    os.link(lines, tmp_path / "hard")
    before = lines.read_bytes()
    arguments = ("embed", lines, "-m", model, "-o", tmp_path / name, "--format", "jsonl")
    for more in ((), ("--resume",)):
        assert call(monkeypatch, *arguments, "--overwrite", *more) == 1
        assert "is the input: give another file" in one_line(capsys)
    assert lines.read_bytes() == before


def test_a_column_without_a_name(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("text,\na,b\n")
    assert [record.text for record in Source(str(path), None, "", None)] == ["b"]
    assert [record.text for record in Source(str(path), None, None, None)] == ["a"]


def test_a_finished_run_of_a_pipe_is_resumed(model: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ("embed", "-", "-m", model, "-o", out, "--resume", "-q")
    for text, status in ((b"a\nb\n", 0), (b"a\nb\n", 0), (b"a\nc\n", 1)):
        assert call(monkeypatch, *arguments, stdin=text) == status


def test_a_finished_run_where_nothing_can_be_noted(
    model: Path, lines: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """On a file system without attributes: an output of whatever run is not replaced."""

    def unsupported(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "setxattr", unsupported)
    arguments = ("embed", lines, "-m", model, "-o", tmp_path / "out.npy", "--resume", "-q")
    assert call(monkeypatch, *arguments) == 0
    assert call(monkeypatch, *arguments) == 1
    assert "exists: --overwrite" in one_line(capsys)


def kept(model: Path, lines: Path, out: Path) -> Path:
    """The folder of a run that was interrupted after two blocks of four records."""
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 2, KeyboardInterrupt())
        assert call(patch, "embed", lines, "-m", model, "-o", out, "-q", *BLOCK) == 130
    return out.with_name(out.name + ".unfinished")


def test_killed_at_the_very_end(
    model: Path, lines: Path, whole: bytes, tmp_path: Path, monkeypatch
) -> None:
    """The output has its name, and the folder is still there: the next run removes it."""
    out = tmp_path / "out.npy"
    arguments = ("embed", lines, "-m", model, "-o", out, "--resume", "-q", *BLOCK)
    assert call(monkeypatch, *arguments) == 0
    moved = tmp_path / "moved"
    out.rename(moved)
    folder = kept(model, lines, out)
    moved.rename(out)
    assert call(monkeypatch, *arguments, "--normalize") == 1
    assert (folder / "log").read_bytes().count(b"\n") == 2
    assert call(monkeypatch, *arguments) == 0
    assert out.read_bytes() == whole and not folder.exists()


def test_an_output_that_appears(
    model: Path, lines: Path, whole: bytes, tmp_path: Path, monkeypatch, capsys
) -> None:
    """While the run goes on: it stays, and the results are kept."""
    out = tmp_path / "out.npy"
    arguments = ("embed", lines, "-m", model, "-o", out, *BLOCK)
    with monkeypatch.context() as inner:
        between_readings(inner, lambda: out.write_bytes(b"of another program"))
        # with results that its input does not change
        assert call(inner, *arguments, "-q") == 1
    assert "out.npy is there now: --resume --overwrite replaces it" in one_line(capsys)
    assert out.read_bytes() == b"of another program"
    assert call(monkeypatch, *arguments, "--resume", "--overwrite") == 0
    assert "going on after 10 of 10" in capsys.readouterr().err
    assert out.read_bytes() == whole


def test_the_loser_knows_at_once(model: Path, lines: Path, tmp_path: Path, monkeypatch, capsys):
    """Before its input is read or its model loaded; and the winner's folder stays as it is."""
    out = tmp_path / "out.npy"
    monkeypatch.setattr(job, "load_encoder", None)
    with Unfinished(tmp_path / "out.npy.unfinished"):
        for more in ((), ("--resume",), ("--overwrite",), ("--resume", "--overwrite")):
            assert call(monkeypatch, "embed", lines, "-m", model, "-o", out, *more) == 1
            assert "out.npy.unfinished is in use by another run" in one_line(capsys)
        assert os.listdir(tmp_path / "out.npy.unfinished") == ["lock"]
    assert not (tmp_path / "out.npy.unfinished").exists()


def test_an_output_that_is_a_link(lines: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "victim.npy").write_text("mine")
    for number, target in enumerate(("victim.npy", "absent.npy")):
        out = tmp_path / f"{number}.npy"
        out.symlink_to(target)
        for more in ((), ("--overwrite",), ("--resume",)):
            assert call(monkeypatch, "embed", lines, "-m", "none", "-o", out, *more) == 1
            assert "is a symbolic link" in one_line(capsys)
    assert (tmp_path / "victim.npy").read_text() == "mine"
    assert not (tmp_path / "absent.npy").exists()


LONG = "n" * 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("embed", "in.txt", "-m", "model", "-o", "n" * 250 + ".npy"), "File name too long"),
        (("embed", "in.txt", "-m", "model", "-o", LONG + ".npy"), "File name too long"),
        (("embed", "in.txt", "-m", "model", "-o", f"{LONG}/o.npy"), "File name too long"),
        (("embed", LONG + ".txt", "-m", "model", "-o", "o.npy"), "File name too long"),
        (("embed", "in.txt", "-m", "model", "-o", "in.txt/o.npy"), "Not a directory"),
        (("embed", "in.txt/in.txt", "-m", "model", "-o", "o.npy"), "Not a directory"),
        (("embed", "in.txt", "-m", LONG, "-o", "o.npy"), "no such folder here"),
        (("embed", "in.txt", "-m", f"a/{LONG}", "-o", "o.npy"), "no such folder here"),
        (("embed", "in.txt", "-m", "two\nlines", "-o", "o.npy"), "--model two lines"),
        (("embed", "in.txt", "-m", "\udcff", "-o", "o.npy"), "--model"),
        (("embed", "in.txt", "-m", "", "-o", "o.npy"), "--model"),
        (("embed", "in.txt", "-m", "in.txt", "-o", "o.npy"), "a folder with a config.json"),
        (("embed", "no\nsuch\udcff.txt", "-m", "model", "-o", "o.npy"), "No such file"),
        (("embed", "in.txt", "-m", "model", "-o", "/proc/o.npy"), "/proc/o.npy.unfinished"),
        (("parity", LONG), "no model with a tokenizer in nnn"),
        (("parity", "./" + LONG), "no such folder"),
        (("parity", "in.txt"), "no model with a tokenizer in in.txt"),
        (("demo", "--model", LONG), "no such folder"),
        (("demo", "--out", f"{LONG}/o.json"), "no such folder to write to"),
        (("bench", "model", "--out", f"{LONG}/o.csv"), "no such folder to write to"),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode()[:40],
)
def test_odd_names(tmp_path: Path, monkeypatch, capsys, arguments: tuple, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("a\n")
    assert call(monkeypatch, *arguments) == 1
    assert message in one_line(capsys)
    assert os.listdir() == ["in.txt"]


def test_odd_names_that_are_fine(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Two lines, a byte that is not UTF-8: a run like any, and each remark is one line."""
    name = "two\nlines \udcff"
    monkeypatch.chdir(tmp_path)
    Path(f"{name}.txt").write_text("a\n")
    assert call(monkeypatch, "embed", f"{name}.txt", "-m", model, "-o", f"{name}.npy") == 0
    assert "1 records in two lines" in one_line(capsys)
    assert np.load(f"{name}.npy").shape == (1, 48)


def test_a_damaged_part_is_made_again(
    model: Path, lines: Path, whole: bytes, tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "out.npy"
    flipped(kept(model, lines, out) / "parts", -1)
    capsys.readouterr()
    assert call(monkeypatch, "embed", lines, "-m", model, "-o", out, "--resume", *BLOCK) == 0
    said = capsys.readouterr().err
    assert "1 blocks that were kept are damaged: made again" in said
    assert "going on after 4 of 10" in said
    assert out.read_bytes() == whole


def test_a_part_that_is_damaged_before_joining(
    model: Path, lines: Path, whole: bytes, tmp_path: Path, monkeypatch, capsys
) -> None:
    """What the error says of --resume is so."""
    out = tmp_path / "out.npy"
    arguments = ("embed", lines, "-m", model, "-o", out, "-q", *BLOCK)
    create = Unfinished.create

    def damaging(unfinished: Unfinished, name: str) -> object:
        if name == "result":
            flipped(unfinished.folder / "parts", -1)
        return create(unfinished, name)

    with monkeypatch.context() as inner:
        inner.setattr(Unfinished, "create", damaging)
        assert call(inner, *arguments) == 1
    assert "parts is damaged: --resume mends it" in one_line(capsys)
    assert not out.exists()
    assert call(monkeypatch, *arguments, "--resume") == 0
    assert out.read_bytes() == whole


def test_a_disk_that_is_full_at_any_write(
    model: Path, lines: Path, whole: bytes, tmp_path: Path, monkeypatch, capsys
) -> None:
    """One line; then, with room, --resume ends as if nothing had been."""
    original = os.fsync
    for number in range(100):
        out = tmp_path / f"{number}.npy"
        arguments = ("embed", lines, "-m", model, "-o", out, "-q", *BLOCK)
        left = [number]

        def full(descriptor: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(descriptor)

        with monkeypatch.context() as inner:
            inner.setattr(os, "fsync", full)
            status = call(inner, *arguments)
        if status == 0:
            break
        message = one_line(capsys)
        assert f"encoder-fast: {out}" in message and ": No space left on device" in message
        assert not out.exists()
        assert call(monkeypatch, *arguments, "--resume") == 0
        assert out.read_bytes() == whole
    # the description, the log, three blocks and their lines, the result
    assert number == 9


def test_results_that_no_later_run_can_use_are_not_kept(
    model: Path, lines: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A text that is too long in the second block: another --long-text is another run."""
    lines.write_text("a\n" * 5 + "x " * 60 + "\n")
    arguments = ("embed", lines, "-m", model, "-o", tmp_path / "o.npy", "--long-text", "error")
    assert call(monkeypatch, *arguments, "-q", *BLOCK) == 1
    assert "record 5 has 60 tokens" in one_line(capsys)
    assert not list(tmp_path.glob("o.*"))


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_a_closed_stream(lines: Path, monkeypatch, capsys, name: str) -> None:
    source, out = ("-", lines.with_name("o.npy")) if name == "stdin" else (lines, "-")
    with monkeypatch.context() as inner:
        inner.setattr(sys, name, None)
        assert call(inner, "embed", source, "-m", "none", "-o", out) == 1
    kind = {"stdin": "input", "stdout": "output"}[name]
    assert one_line(capsys) == f"encoder-fast: standard {kind} is closed\n"


def test_a_closed_standard_error(model: Path, lines: Path, monkeypatch, capsys) -> None:
    """Remarks and errors go nowhere; above all not into the output."""
    with monkeypatch.context() as inner:
        inner.setattr(sys, "stderr", None)
        assert call(inner, "embed", lines, "-m", model, "-o", "-") == 0
        assert call(inner, "embed", lines, "-m", "./absent", "-o", "-") == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 10


def test_an_error_that_no_command_expects(lines: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def broken(choice: object) -> None:
        raise KeyError("of\ntwo lines")

    monkeypatch.setattr(job, "load_encoder", broken)
    arguments = ("embed", lines, "-m", "none", "-o", tmp_path / "o.npy")
    assert call(monkeypatch, *arguments) == 1
    assert one_line(capsys) == "encoder-fast: KeyError: 'of\\ntwo lines'\n"
    assert not list(tmp_path.glob("o.*"))


SHELL = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
from encoder_fast.cli import main
sys.argv[1:] = ["--version"]
try:
    main()
finally:
    with open("result", "w") as file:
        print(file.fileno(), file=file)
"""


def test_files_do_not_get_the_numbers_of_closed_streams(tmp_path: Path) -> None:
    """What a library prints to number 2 would be written to a file of results."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", SHELL], cwd=tmp_path, env=environment)
    assert int((tmp_path / "result").read_text()) > 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_help_to_a_full_disk_and_to_nobody() -> None:
    command = [sys.executable, "-m", "encoder_fast.cli", "--help"]
    options = {"stderr": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[1]}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, **options)
    assert done.returncode == 1
    assert done.stderr == "encoder-fast: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, **options)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_say_is_one_line(capsys) -> None:
    errors.say("of two\nlines")
    assert capsys.readouterr().err == "encoder-fast: of two lines\n"
