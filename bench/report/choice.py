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
    """What is known of one device: each case from the newest record that has it.

    Attributes:
        taken: for each suite the record of each case.
        now: the sources as they are.
    """

    name: str
    slug: str
    taken: dict[str, dict[str, Record]]
    now: dict[str, str]

    @property
    def is_gpu(self) -> bool:
        return any(record.header["machine"]["kind"] == "gpu" for record in self.records())

    def has(self, suite: str) -> bool:
        return suite in self.taken

    def records(self, suite: str | None = None) -> tuple[Record, ...]:
        """Those that cases were taken from, of one suite or of all, the newest first."""
        suites = self.taken if suite is None else [suite]
        found = {
            record.path: record for name in suites for record in self.taken[name].values()
        }.values()
        return tuple(sorted(found, key=lambda record: record.header["date"], reverse=True))

    def rows(self, suite: str) -> tuple[Row, ...]:
        taken = self.taken.get(suite, {})
        return tuple(
            row for case, record in taken.items() for row in record.suite(suite) if row.case == case
        )

    def cases(self, suite: str) -> Iterator[Case]:
        """The cases of a suite, as they were run."""
        names = dict.fromkeys(row.case for row in self.rows(suite))
        for name in names:
            rows = tuple(row for row in self.rows(suite) if row.case == name)
            yield Case(name, rows, self)

    def stale(self, row: Row) -> tuple[str, ...]:
        """The files behind a row of ours that are no longer what they were."""
        then = self.taken[row.suite][row.case].header["sources"]
        return changed(row.sources, then, self.now)


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

    Of several records of a case the newest counts; a quick one only where there is no other. One
    in which nobody ran gives way to any in which somebody did.
    """
    found: dict[tuple[str, str], dict[str, dict[str, Record]]] = {}
    for record in records_in(results):
        if record.header["fake"]:
            continue
        suites = found.setdefault((record.device, record.path.parent.name), {})
        for suite in SUITES:
            for case in dict.fromkeys(row.case for row in record.suite(suite)):
                taken = suites.setdefault(suite, {})
                known = taken.get(case)
                if known is None or _worth(record, suite, case) >= _worth(known, suite, case):
                    taken[case] = record
    devices = []
    for (name, slug), suites in found.items():
        # a suite of which nothing ran is no suite
        ran = {
            suite: taken
            for suite, taken in suites.items()
            if any(_worth(record, suite, case)[0] for case, record in taken.items())
        }
        if ran:
            devices.append(Device(name, slug, ran, now))
    return sorted(devices, key=lambda device: (not device.is_gpu, device.slug))


def _worth(record: Record, suite: str, case: str) -> tuple[bool, bool]:
    ran = any(row.case == case and row.status == OK for row in record.suite(suite))
    return ran, not record.header["quick"]
