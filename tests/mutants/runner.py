"""Breaks the kernels on purpose, one line at a time, and says which test notices.

    python tests/mutants/runner.py [--only PATTERN ...] [--jobs N] [--out FILE] [--missing]

The mutations are the entries of the TOML files beside this one. Each is applied to a copy of the
tree, never to the tree itself, and one of the tests that it names has to fail there, and to pass
without it. A mutant that survives is a hole in the tests, unless it says why it `survives`. The
status is 0 only if every mutant that was run is caught, or survives as it says.

With --out the table is written after each mutant, and rows of mutants that are not run stay. So a
run may be cut at any moment, and goes on with --missing. That runs mutants without a row, those
that were edited since, and those whose result is not as it should be.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# What a copy of the tree has none of. Bytecode would be taken for that of a file changed within the
# same second; of the caches the compiled objects are worth their while.
LEFT_OUT = (".*", "__pycache__", "build", "dist")
OBJECTS = ".cache/cuda_host/objects"

# Seconds for tests without a mutation, which may have to compile first.
LIMIT_WITHOUT = 1800.0

HEAD = """\
# What the tests notice

`make mutants` breaks the kernels on purpose, one edit at a time, and runs the narrowest tests that
should fail. This table has the mutants that were run, and the first test that caught each. A mutant
that no test can notice here says why. `tests/mutants/*.toml` lists all of them.

It shows how dense the tests are, not that the code is right. Kernels in `csrc/` run in the
emulation and those in `kernels/` in Triton's interpreter, so it says nothing of the code that
compilers make of them; `make test-gpu` runs that on a card.

| mutant | file | change | result | why it matters |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Mutant:
    """One edit. `old` is in the file once; `tests` are arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    why: str
    # Why no test here can notice: no result changes, or not on this machine.
    survives: str = ""

    def fault(self, root: Path) -> str | None:
        """Why it does not apply."""
        path = root / self.file
        times = path.read_text("utf-8").count(self.old) if path.exists() else 0
        if times != 1 or self.old == self.new:
            return f"{self.name}: `old` is {times} times in {self.file}, and not once"
        return None

    def change(self, root: Path) -> tuple[str, str, str]:
        """Its file, and the lines as they are and as they become."""
        text = (root / self.file).read_text("utf-8")
        before, after = text.splitlines(), text.replace(self.old, self.new).splitlines()
        steps = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
        differing = [step for step in steps if step[0] != "equal"]
        (_, first, _, begin, _), (_, _, last, _, end) = differing[0], differing[-1]
        return self.file, _code(before[first:last]), _code(after[begin:end])


@dataclass(frozen=True)
class Outcome:
    result: str  # "caught by ...", "SURVIVED", ...
    good: bool


def read_mutants(folder: Path = HERE) -> list[Mutant]:
    entries = [
        entry
        for path in sorted(folder.glob("*.toml"))
        for entry in tomllib.loads(path.read_text("utf-8"))["mutant"]
    ]
    return [Mutant(**entry) for entry in entries]


def _code(lines: list[str]) -> str:
    text = " ".join(line.strip() for line in lines)
    text = text if len(text) <= 160 else text[:157] + "..."
    return "`` " + text.replace("|", "\\|") + " ``" if text else "nothing"


class Trees:
    """Copies of the tree, one a job, and the processes that run in them."""

    def __init__(self, root: Path, folder: Path, jobs: int) -> None:
        self.free: queue.Queue[Path] = queue.Queue()
        self.running: set[subprocess.Popen[str]] = set()
        self.ended = False
        self.passing: dict[str, bool] = {}
        for i in range(jobs):
            tree = folder / f"tree{i}"
            shutil.copytree(root, tree, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
            if (root / OBJECTS).is_dir():
                shutil.copytree(root / OBJECTS, tree / OBJECTS)
            self.free.put(tree)

    @contextmanager
    def one(self) -> Iterator[Path]:
        tree = self.free.get()
        try:
            yield tree
        finally:
            self.free.put(tree)

    def pytest(self, tree: Path, arguments: str, limit: float) -> tuple[int | None, str]:
        """The status, `None` beyond the limit, and what was printed."""
        if self.ended:
            raise KeyboardInterrupt
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider"]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.setdefault("OMP_NUM_THREADS", "1")
        # Importing them takes longer than many of the tests.
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        process = subprocess.Popen(
            [*command, *shlex.split(arguments)],
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.running.add(process)
        try:
            output, _ = process.communicate(timeout=limit)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            self.end(process)

    def pass_without_mutation(self, tree: Path, arguments: str) -> bool:
        """Whether these tests fail for the mutation alone. `tree` has none."""
        if arguments not in self.passing:
            status, output = self.pytest(tree, arguments, LIMIT_WITHOUT)
            self.passing[arguments] = status == 0 and _passed(output)
        return self.passing[arguments]

    def end(self, process: subprocess.Popen[str]) -> None:
        """End a process and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.running.discard(process)

    def end_all(self) -> None:
        self.ended = True
        for process in list(self.running):
            self.end(process)


def judge(trees: Trees, mutant: Mutant, limit: float) -> Outcome:
    """Run a mutant's tests."""
    with trees.one() as tree:
        path = tree / mutant.file
        text = path.read_text("utf-8")
        path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
        try:
            status, output = trees.pytest(tree, mutant.tests, limit)
        finally:
            path.write_text(text, "utf-8")
        caught = _caught_by(status, output)
        if caught is not None:
            by, tests = caught
            if not trees.pass_without_mutation(tree, tests or mutant.tests):
                return Outcome(f"BROKEN: {by} without the mutation too", False)
            stale = f", which was to survive: {mutant.survives}" if mutant.survives else ""
            return Outcome(f"caught by {by}{stale}", not mutant.survives)
    if status != 0 or not _passed(output):
        print(output[-3000:], file=sys.stderr)
        return Outcome(f"BROKEN: pytest ended with {status}", False)
    if mutant.survives:
        return Outcome(f"survives: {mutant.survives}", True)
    return Outcome("SURVIVED", False)


def _passed(output: str) -> bool:
    return re.search(r"^\d+ passed", output, re.MULTILINE) is not None


def _caught_by(status: int | None, output: str) -> tuple[str, str] | None:
    """What caught a mutant, and the test that did, as an argument of pytest, if it was one."""
    if status is None:
        return "the time limit", ""
    if status < 0:
        return f"signal {-status}", ""
    # A mutant that does not compile says nothing of the tests, unless an assertion forbids it.
    if "static assertion failed" in output:
        return "a static assertion", ""
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if status == 1 and failed and "g++ " not in failed[0]:
        return f"`{failed[1].removeprefix('tests/')}`", shlex.quote(failed[1])
    return None


class Table:
    """The results in Markdown. Rows that are there already stay until their mutant is run again."""

    def __init__(self, path: Path | None, mutants: Iterable[Mutant], root: Path) -> None:
        self.path, self.mutants, self.root = path, list(mutants), root
        self.rows: dict[str, str] = {}
        if path is not None and path.exists():
            lines = [x for x in path.read_text("utf-8").splitlines() if x.startswith("| `")]
            self.rows = {line.split(" | ")[0].strip("| `"): line for line in lines}

    def is_right(self, mutant: Mutant) -> bool:
        """Whether there is a row of the mutant as it is, with the result that it should have."""
        file, before, after = mutant.change(self.root)
        result = "survives: " if mutant.survives else "caught by "
        row = self.rows.get(mutant.name, "")
        return f" | {file} | {before} → {after} | {result}" in row

    def add(self, mutant: Mutant, outcome: Outcome) -> None:
        file, before, after = mutant.change(self.root)
        cells = (f"`{mutant.name}`", file, f"{before} → {after}", outcome.result, mutant.why)
        self.rows[mutant.name] = f"| {' | '.join(cells)} |"
        if self.path is not None:
            rows = [self.rows[m.name] for m in self.mutants if m.name in self.rows]
            unfinished = self.path.with_name(self.path.name + ".new")
            unfinished.write_text(HEAD + "\n".join(rows) + "\n", "utf-8")
            unfinished.replace(self.path)


def run(
    root: Path,
    mutants: list[Mutant],
    selected: list[Mutant],
    *,
    jobs: int,
    limit: float,
    out: Path | None,
) -> int:
    """Run the selected ones. Returns the exit status."""
    faults = [fault for mutant in mutants if (fault := mutant.fault(root)) is not None]
    if faults:
        print(*faults, sep="\n", file=sys.stderr)
        return 2
    table = Table(out, mutants, root)
    begun, bad = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = Trees(root, Path(folder), jobs)
        pool = ThreadPoolExecutor(jobs)
        try:
            futures = {pool.submit(judge, trees, mutant, limit): mutant for mutant in selected}
            for done, future in enumerate(as_completed(futures), start=1):
                mutant, outcome = futures[future], future.result()
                bad += not outcome.good
                table.add(mutant, outcome)
                place = f"{time.monotonic() - begun:5.0f} s {done:3}/{len(selected)}"
                print(f"{place}  {mutant.name}: {outcome.result}", flush=True)
        except KeyboardInterrupt:
            print("cut short", file=sys.stderr)
            return 130
        finally:
            trees.end_all()
            pool.shutdown(cancel_futures=True)
    print(f"{len(selected)} mutants, {bad} of them not as they should be")
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["*"], help="names or files, with * and ?")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for a mutant")
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--missing", action="store_true", help="those that it has no good row of")
    arguments = parser.parse_args()

    def interrupt(*_: object) -> None:
        # Once: what runs is ended, and the copies are removed.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    mutants = read_mutants()
    selected = [
        mutant
        for mutant in mutants
        if any(
            fnmatch.fnmatch(text, pattern)
            for text in (mutant.name, mutant.file)
            for pattern in arguments.only
        )
    ]
    if arguments.missing:
        table = Table(arguments.out, mutants, ROOT)
        selected = [mutant for mutant in selected if not table.is_right(mutant)]
    options = {"jobs": arguments.jobs, "limit": arguments.limit, "out": arguments.out}
    return run(ROOT, mutants, selected, **options)


if __name__ == "__main__":
    sys.exit(main())
