"""The folder of a run that is not done: rivals, links and damage."""

import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
from cli_runs import call, flipped, keep_threads, lines, model, one_line

from encoder_fast.cli.errors import UserError
from encoder_fast.cli.parts import Part, Unfinished

__all__ = ["keep_threads", "lines", "model"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:.* were cut")


def test_a_rival_at_each_moment_of_the_end(tmp_path: Path, monkeypatch) -> None:
    """It is told that the folder is in use, or has one of its own, and loses nothing."""
    folder, outcomes, rivals = tmp_path / "o.unfinished", [], []

    def spied(original: Callable) -> Callable:
        def run(*arguments: object, **options: object) -> object:
            if not rivals:
                try:
                    rivals.append(Unfinished(folder))
                    outcomes.append("its own")
                    rivals[0].begin({}, resume=True, keeps=True)
                    rivals[0].append(Part(["b"], [{}]), cut=0, tokens_per_batch=1, read="")
                except UserError as error:
                    assert "in use by another run" in str(error)
                    outcomes.append("in use")
            return original(*arguments, **options)

        return run

    with Unfinished(folder) as first:
        first.begin({}, resume=False, keeps=True)
        first.append(Part(["a"], [{}]), cut=0, tokens_per_batch=1, read="")
        first.keep = False
        monkeypatch.setattr(os, "unlink", spied(os.unlink))
        monkeypatch.setattr(os, "rmdir", spied(os.rmdir))
    assert set(outcomes[:-1]) == {"in use"} and outcomes[-1] == "its own" and len(outcomes) > 4
    assert [part.ids for part in rivals[0]] == [["b"]]
    rivals[0].keep = False
    rivals[0].__exit__()
    assert not folder.exists()


def test_many_rivals(tmp_path: Path) -> None:
    """One has the folder at a time, however often it comes and goes."""
    inside, most, wins = [], [], []

    def compete() -> None:
        for _ in range(150):
            with suppress(UserError), Unfinished(tmp_path / "o.unfinished") as mine:
                inside.append(1)
                most.append(len(inside))
                mine.begin({}, resume=False, keeps=False)
                inside.pop()
                wins.append(1)

    threads = [threading.Thread(target=compete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(wins) == len(most) > 1
    assert not list(tmp_path.iterdir())


FILES = ("lock", "run.json", "log", "parts", "result", "run.json.new", "log.new")


RUN = {"command": "embed"}


PARTS = [Part(list(range(i, i + 4)), np.full((4, 48), i, np.float32)) for i in (0, 4, 8)]


def append(unfinished: Unfinished, parts: list[Part]) -> None:
    for part in parts:
        unfinished.append(part, cut=0, tokens_per_batch=4096, read="")


def two_parts(folder: Path) -> Path:
    """A folder that holds the first two of ``PARTS``."""
    with Unfinished(folder) as unfinished:
        unfinished.begin(RUN, resume=False, keeps=True)
        append(unfinished, PARTS[:2])
    return folder


def goes_on(folder: Path, *, resume: bool = True) -> int:
    """How many of ``PARTS`` were there. The others are added; all must be right in the end."""
    with Unfinished(folder) as unfinished:
        unfinished.begin(RUN, resume=resume, keeps=True)
        found = len(unfinished.entries)
        append(unfinished, PARTS[found:])
        with unfinished.create("result") as file:
            file.writelines(part.results.tobytes() for part in unfinished)
        unfinished.move("result", folder.with_name("out"))
        unfinished.keep = False
    expected = np.concatenate([part.results for part in PARTS])
    assert np.array_equal(
        np.fromfile(folder.with_name("out"), np.float32).reshape(12, 48), expected
    )
    return found


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["symbolic", "dangling", "hard", "pipe", "folder"])
def test_links_in_place_of_files(tmp_path: Path, kind: str, name: str, resume: bool) -> None:
    """An error or a run that is right; what they lead to is left alone, no pipe is waited on."""
    folder, victim = two_parts(tmp_path / "out.unfinished"), tmp_path / "victims" / name
    victim.parent.mkdir()
    victim.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"mine")
    before = victim.read_bytes()
    (folder / name).unlink(missing_ok=True)
    if kind == "symbolic":
        (folder / name).symlink_to(victim)
    elif kind == "dangling":
        (folder / name).symlink_to(victim.with_name("absent"))
    elif kind == "hard":
        os.link(victim, folder / name)
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).mkdir()
    try:
        goes_on(folder, resume=resume)
    except (UserError, OSError) as error:
        assert str(folder / name) in str(error)
        assert not (tmp_path / "out").exists()
    assert os.listdir(victim.parent) == [name] and victim.read_bytes() == before


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "pipe"])
def test_the_folder_is_none(lines: Path, tmp_path: Path, monkeypatch, capsys, kind: str) -> None:
    folder, victim = tmp_path / "out.npy.unfinished", tmp_path / "victim"
    victim.mkdir()
    (victim / "parts").write_text("mine")
    if "link" in kind:
        folder.symlink_to(victim if kind == "link" else tmp_path / "absent")
    elif kind == "file":
        folder.write_text("mine")
    else:
        os.mkfifo(folder)
    for more in ("--resume", "--overwrite"):
        arguments = ("embed", lines, "-m", "none", "-o", tmp_path / "out.npy", more)
        assert call(monkeypatch, *arguments) == 1
        assert one_line(capsys) == f"encoder-fast: {folder} is a link or a file, not a folder\n"
    assert [path.read_text() for path in victim.iterdir()] == ["mine"]
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("content", [b"[1]", b"5", b"null", b'"a"', b"", b"\xff", b"[" * 100_000])
def test_a_damaged_description(lines: Path, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "o.unfinished"
    folder.mkdir()
    (folder / "run.json").write_bytes(content)
    with Unfinished(folder) as mine, pytest.raises(UserError, match="damaged: --overwrite begins"):
        mine.begin({"command": "embed"}, resume=True, keeps=True)
    assert (folder / "run.json").read_bytes() == content


def log_with(folder: Path, **changes: object) -> None:
    """The first line of a log, changed."""
    first, *rest = (folder / "log").read_text().splitlines(keepends=True)
    line = json.dumps({**json.loads(first), **changes}) + "\n"
    (folder / "log").write_text(line + "".join(rest))


DAMAGES = {
    "first part": (0, lambda folder: flipped(folder / "parts", 30)),
    "second part": (1, lambda folder: flipped(folder / "parts", -1)),
    "parts are shorter": (1, lambda folder: os.truncate(folder / "parts", 1700)),
    "parts are gone": (0, lambda folder: (folder / "parts").unlink()),
    "log is gone": (0, lambda folder: (folder / "log").unlink()),
    "stop": (0, lambda folder: log_with(folder, stop=10**18)),
    "negative": (0, lambda folder: log_with(folder, stop=-1)),
    "words": (0, lambda folder: log_with(folder, stop="a", records=None)),
    "budget": (0, lambda folder: log_with(folder, tokens_per_batch=7)),
    "count": (0, lambda folder: log_with(folder, records=3)),
    "not known": (0, lambda folder: log_with(folder, more=3)),
    "no object": (0, lambda folder: (folder / "log").write_text("[]\n5\n")),
    "no JSON": (1, lambda folder: flipped(folder / "log", -2)),
    "no text": (0, lambda folder: (folder / "log").write_bytes(b"\xff\n" + b"[" * 100_000 + b"\n")),
}


@pytest.mark.parametrize(("left", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_parts(tmp_path: Path, left: int, damage: Callable[[Path], object]) -> None:
    """They are made again, with all that follow them; what is whole before them is kept."""
    folder = two_parts(tmp_path / "out.unfinished")
    assert (folder / "parts").stat().st_size > 1700
    damage(folder)
    assert goes_on(folder) == left


def test_any_damaged_byte(tmp_path: Path) -> None:
    """A bit of the folder's files turns: the results are right, or it is an error."""
    for name in ("run.json", "log", "parts"):
        for number in range(12):
            place = tmp_path / f"{name}{number}"
            place.mkdir()
            folder = two_parts(place / "out.unfinished")
            flipped(folder / name, number * 997 % (folder / name).stat().st_size)
            try:
                goes_on(folder)
            except UserError as error:
                assert name == "run.json" and "--overwrite begins anew" in str(error)
