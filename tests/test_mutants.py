"""The mutations of the kernels apply to the code as it is, and their runner tells what it should.

`make mutants` runs them; here none is run but those of a tree made for it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mutants.runner import ROOT, Mutant, Table, read_mutants, run

MUTANTS = read_mutants()
if not (ROOT / "csrc").is_dir():
    pytest.skip("the sources are not here", allow_module_level=True)


def test_every_mutation_applies_once() -> None:
    faults = [fault for mutant in MUTANTS if (fault := mutant.fault(ROOT)) is not None]
    assert not faults, "\n".join(faults)


def test_every_mutant_has_a_name_of_its_own() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)


def test_every_kernel_file_has_mutants() -> None:
    files = {mutant.file for mutant in MUTANTS}
    kernels = {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels <= files
    units = {path for path in (ROOT / "csrc").rglob("*.cu*") if "cpu" not in path.parts}
    bodies = {path for path in units if "EF_DEVICE" in path.read_text("utf-8")}
    assert {str(path.relative_to(ROOT)) for path in bodies} <= files


def test_every_mutants_tests_are_there() -> None:
    for mutant in MUTANTS:
        for argument in mutant.tests.split():
            if argument.startswith("tests/"):
                assert (ROOT / argument.split("::")[0]).exists(), mutant.name


def test_the_table_has_nothing_bad() -> None:
    """A row may be of code that has changed since; `--missing` runs those again."""
    rows = Table(ROOT / "docs/mutants.md", MUTANTS, ROOT).rows
    assert set(rows) <= {mutant.name for mutant in MUTANTS}
    for mutant in MUTANTS:
        good = "| survives: " if mutant.survives else "| caught by "
        assert mutant.name not in rows or good in rows[mutant.name], mutant.name


CODE = """
def limit(x):
    while x > 5:
        x -= 1
    return x
"""

TEST = """
from code_under_test import limit

def test_limit():
    assert limit(9) == 5
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "tests").mkdir(parents=True)
    (root / "code_under_test.py").write_text(CODE)
    (root / "tests/test_limit.py").write_text(TEST)
    return root


def mutant(name: str, old: str, new: str, survives: str = "") -> Mutant:
    test = "tests/test_limit.py"
    return Mutant(name, "code_under_test.py", old, new, test, "an example", survives)


def test_the_runner(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mutants = [
        mutant("caught", "> 5", "> 4"),
        mutant("survives", "> 5", ">= 6"),
        mutant("equal", "> 5", ">= 6", survives="the same for integers"),
        mutant("broken", "def", "dfe"),
    ]
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    out = tree.parent / "table.md"
    options = {"jobs": 2, "limit": 300.0, "out": out}
    assert run(tree, mutants, mutants, **options) == 1
    assert {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()} == before

    rows = [row.split(" | ") for row in out.read_text().splitlines() if row.startswith("| `")]
    assert [row[0].strip("| `") for row in rows] == [each.name for each in mutants]
    results = [row[3] for row in rows]
    assert results == [
        "caught by `test_limit.py::test_limit`",
        "SURVIVED",
        "survives: the same for integers",
        "BROKEN: pytest ended with 2",
    ]
    table = Table(out, mutants, tree)
    assert [table.is_right(each) for each in mutants] == [True, False, True, False]
    edited = mutant("caught", "> 5", "> 3")
    assert not table.is_right(edited)
    assert rows[0][1:3] == ["code_under_test.py", "`` while x > 5: `` → `` while x > 4: ``"]

    # The rows of what is not run again stay.
    shutil.copy(out, tree.parent / "before.md")
    assert run(tree, mutants, mutants[2:3], **options) == 0
    assert out.read_text() == (tree.parent / "before.md").read_text()


def test_a_mutant_that_hangs_is_caught(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hangs = [mutant("hangs", "x -= 1", "x -= 0")]
    assert run(tree, hangs, hangs, jobs=1, limit=3.0, out=None) == 0
    assert "hangs: caught by the time limit" in capsys.readouterr().out


def test_the_runner_refuses_what_proves_nothing(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"jobs": 1, "limit": 60.0, "out": None}
    moved = [mutant("moved", "x > 6", "x > 7")]
    assert run(tree, moved, moved, **options) == 2
    assert "moved: `old` is 0 times" in capsys.readouterr().err
    (tree / "tests/test_limit.py").write_text(TEST.replace("== 5", "== 6"))
    failing = [mutant("any", "> 5", "> 4")]
    assert run(tree, failing, failing, **options) == 1
    assert "without the mutation too" in capsys.readouterr().out
