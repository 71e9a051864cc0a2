"""Which records a report is made of, and what has changed since they were taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.record import OK, Record, Row, records_in
from bench.sources import changed

SUITES = ("models", "latency", "texts", "kernels")


@dataclass(frozen=True)
class Device:
    """What is known of one device: for each suite the newest record that has it."""

    name: str
    slug: str
    records: dict[str, Record]
    now: dict[str, str]

    @property
    def is_gpu(self) -> bool:
        return any(record.header["machine"]["kind"] == "gpu" for record in self.records.values())

    def rows(self, suite: str) -> tuple[Row, ...]:
        return self.records[suite].suite(suite) if suite in self.records else ()

    def cases(self, suite: str) -> Iterator[Case]:
        """The cases of a suite, as they were run."""
        names = dict.fromkeys(row.case for row in self.rows(suite))
        for name in names:
            rows = tuple(row for row in self.rows(suite) if row.case == name)
            yield Case(name, rows, self)

    def stale(self, row: Row) -> tuple[str, ...]:
        """The files behind a row of ours that are no longer what they were."""
        return changed(row.sources, self.records[row.suite].header["sources"], self.now)


@dataclass(frozen=True)
class Case:
    """The contestants of one case."""

    name: str
    rows: tuple[Row, ...]
    device: Device

    @property
    def facts(self) -> dict:
        return self.rows[0].facts

    @property
    def timed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == OK)

    @property
    def ours(self) -> Row | None:
        """Our own, by default settings: the first of ours that stands in the record."""
        return next((row for row in self.rows if row.ours and row.status == OK), None)

    def row(self, contestant: str) -> Row | None:
        return next((row for row in self.timed if row.contestant == contestant), None)

    @property
    def best_peer(self) -> Row | None:
        peers = [row for row in self.timed if not row.ours]
        return min(peers, key=lambda row: row.median, default=None)

    @property
    def baseline(self) -> Row | None:
        """What people run today: SDPA where transformers has it, or else eager."""
        for name in ("Hugging Face SDPA", "Hugging Face eager", "sentence-transformers"):
            row = self.row(name)
            if row is not None:
                return row
        return self.best_peer


def choose(results: Path, now: dict[str, str]) -> list[Device]:
    """The devices that have records, GPUs first.

    Of several records of a suite the newest counts; a quick one only where there is no other, and
    one that was stopped only for the suites that it came to.
    """
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records_in(results):
        if record.header["fake"]:
            continue
        key = record.device, record.path.parent.name
        suites = found.setdefault(key, {})
        for suite in SUITES:
            if not any(row.status == OK for row in record.suite(suite)):
                continue
            known = suites.get(suite)
            if known is None or known.header["quick"] or not record.header["quick"]:
                suites[suite] = record
    devices = [Device(name, slug, suites, now) for (name, slug), suites in found.items() if suites]
    return sorted(devices, key=lambda device: (not device.is_gpu, device.slug))
