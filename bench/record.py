"""A run's record: one JSON file, whole and valid after every result, so that a run can be stopped.

Its form is described in ``bench/results/README.md``. Rows stand one a line: a record is read by
people too, and a diff of two shows which figures moved.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.machine import Machine, gpu_facts
from bench.sources import ROOT, fingerprints
from bench.timing import Times
from encoder_fast.parity import ParityRow

SCHEMA = 1
RESULTS = ROOT / "bench" / "results"

OK, SKIPPED, WRONG, FAILED = "ok", "skipped", "wrong", "failed"


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant of one case.

    Attributes:
        suite: ``kernels``, ``models``, ``latency`` or ``texts``.
        case: what is run; contestants of one case do the same work.
        contestant: who runs it.
        ours: whether that is encoder_fast.
        status: ``ok``; ``skipped``, ``wrong`` (parity) and ``failed`` have a reason and no times.
        facts: of the case: model or op, dtype, shapes, lengths, work in bytes, operations, tokens.
        parity: error, original_error and floor by the parity rule.
        seconds: p20, p50, p80, p99 and the number of samples, for one call.
        sources: prefixes of our files that decide the figure.
    """

    suite: str
    case: str
    contestant: str
    ours: bool
    status: str
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, float | None] | None = None
    seconds: dict[str, float | int] | None = None
    samples: tuple[float, ...] = ()
    clock: str = ""
    memory_bytes: int | None = None
    outside_kernels: float | None = None
    sources: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        return self.suite, self.case, self.contestant

    @property
    def median(self) -> float:
        """Seconds of one call; only a row that is ``ok`` has them."""
        if self.seconds is None:
            raise ValueError(f"{self.case}, {self.contestant}: {self.status}, there is no time")
        return float(self.seconds["p50"])

    @property
    def spread(self) -> float:
        """From the 20th to the 80th percentile, as a share of the median."""
        if self.seconds is None:
            return 0.0
        return (float(self.seconds["p80"]) - float(self.seconds["p20"])) / self.median


def parity_facts(row: ParityRow) -> dict[str, float | None]:
    """The errors of the parity rule; ``None`` for NaN, which JSON does not have."""
    values = {"error": row.error, "original_error": row.original_error, "floor": row.floor}
    return {k: float(f"{v:.4g}") if math.isfinite(v) else None for k, v in values.items()}


def timed(times: Times) -> dict[str, Any]:
    """The fields of a row that come from the clock."""
    return {"seconds": times.summary(), "samples": times.samples, "clock": times.clock}


class RecordWriter:
    """Writes a run's record anew with each row."""

    def __init__(self, machine: Machine, name: str, *, quick: bool, folder: Path | None = None):
        now = datetime.now(UTC)
        commit = commit_of(ROOT)
        self._start = time.perf_counter()
        self._machine = machine
        folder = folder or RESULTS / machine.slug
        folder.mkdir(parents=True, exist_ok=True)
        quickly = "-quick" if quick else ""
        self.path = folder / f"{name}{quickly}-{now:%Y%m%d-%H%M%S}-{commit[:12]}.json"
        self.header: dict[str, Any] = {
            "schema": SCHEMA,
            "command": command_line(),
            "commit": commit,
            "date": now.isoformat(timespec="seconds"),
            "quick": quick,
            "fake": machine.is_fake,
            "finished": False,
            "machine": machine.facts(),
            "sources": fingerprints(),
            "roofs": {},
        }
        self.rows: list[Row] = []

    def set_roofs(self, roofs: dict[str, float]) -> None:
        self.header["roofs"] = roofs
        self._write()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write()

    def finish(self) -> None:
        self.header["finished"] = True
        if self._machine.is_gpu:
            self.header["gpu_after"] = gpu_facts()
        self._write()

    def _write(self) -> None:
        self.header["run_seconds"] = round(time.perf_counter() - self._start, 1)
        unfinished = self.path.with_name(self.path.name + ".part")
        unfinished.write_text(dump(self.header, self.rows), "utf-8")
        unfinished.replace(self.path)


def dump(header: dict[str, Any], rows: list[Row]) -> str:
    head = json.dumps(header, indent=1, allow_nan=False)
    lines = ",\n".join("  " + json.dumps(_sparse(row), allow_nan=False) for row in rows)
    return f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'


def _sparse(row: Row) -> dict[str, Any]:
    always = ("suite", "case", "contestant", "ours", "status")
    return {k: v for k, v in asdict(row).items() if k in always or v not in (None, "", (), {})}


@dataclass(frozen=True)
class Record:
    """A record as it is read back."""

    path: Path
    header: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def device(self) -> str:
        return str(self.header["machine"]["device"])

    def suite(self, name: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.suite == name)


def read(path: Path) -> Record:
    """Read a record.

    Raises:
        ValueError: the file is no record of this form.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} is no record of schema {SCHEMA}")
    rows = tuple(
        Row(**{k: tuple(v) if k in ("samples", "sources") else v for k, v in row.items()})
        for row in content.pop("rows")
    )
    return Record(path, content, rows)


def records_in(folder: Path) -> Iterator[Record]:
    """All records under a folder, oldest first; files of another form are passed over."""
    found = []
    for path in folder.rglob("*.json"):
        try:
            found.append(read(path))
        except ValueError:
            continue
    yield from sorted(found, key=lambda record: record.header["date"])


def command_line() -> str:
    """What was typed, of paths their last part alone: a record is for others to read."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", "bench", *words])


def commit_of(root: Path) -> str:
    """The commit of the tree, with a mark where it was changed; of a tree that came without its
    history what ENCODER_FAST_COMMIT says."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ENCODER_FAST_COMMIT", "unknown")
    return described.stdout.strip()
