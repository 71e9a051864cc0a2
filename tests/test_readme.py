"""The README tells the truth: its snippets run, print what it says, and its names exist.

A ``text`` block after a snippet is what the snippet prints, figures aside. ``console`` blocks vary
from machine to machine; their commands are looked up, not run.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest
from berts import minilm_path

from encoder_fast.families import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = [
    line.removeprefix("$ ").partition("#")[0].split()
    for kind, text in BLOCKS
    if kind == "console"
    for line in text.splitlines()
    if line.startswith("$ ")
]


def shape(text: str) -> list[str]:
    """The lines of an output with every number as one sign."""
    return [re.sub(r"\d[\d.e+-]*", "#", " ".join(line.split())) for line in text.splitlines()]


def test_snippets_run_and_print_what_is_shown() -> None:
    """In order and in one namespace, as a reader would type them, with the model from disk."""
    name = '"sentence-transformers/all-MiniLM-L6-v2"'
    assert name in README
    namespace: dict[str, object] = {}
    printed = ""
    for kind, text in BLOCKS:
        if kind == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(
                    compile(text.replace(name, repr(minilm_path())), "README.md", "exec"), namespace
                )
            printed = output.getvalue()
        elif kind == "text":
            assert shape(printed) == shape(text), printed


def test_first_screen_says_how_to_start() -> None:
    screen = "\n".join(README.splitlines()[:30])
    for what in ("encoder_fast.patch(model)", "$ make demo", "$ make test"):
        assert what in screen


def test_first_screen_says_what_no_gpu_has_shown() -> None:
    """As long as there is no record of one; then its figures belong there instead."""
    records = (ROOT / "bench/results").glob("*/*.json")
    measured = any('"kind": "gpu"' in path.read_text("utf-8") for path in records)
    screen = " ".join(README.split("```")[0].split())
    assert ("Nothing has run on a GPU yet" in screen) != measured


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {command[1] for command in COMMANDS if command[0] == "make"}
    assert {"demo", "test"} <= named <= targets


def test_commands_exist() -> None:
    typer = pytest.importorskip("typer")
    from encoder_fast.cli import app

    known = set(typer.main.get_command(app).commands)
    inline = re.findall(r"`encoder-fast (\w+)", README)
    shown = [command[1] for command in COMMANDS if command[0] == "encoder-fast"]
    assert {"demo", "info"} <= {*inline, *shown} <= known


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    if target.startswith("#"):
        headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
        assert target[1:] in {heading.lower().replace(" ", "-") for heading in headings}
    else:
        assert (ROOT / target).exists()


def test_every_family_is_listed() -> None:
    rows = dict(re.findall(r"^\| (\w+) \| `(\w+)` \|", README, re.MULTILINE))
    assert rows == {family.name: family.class_names[0] for family in FAMILIES}
