"""One run: which cases are wanted, how much time is left, and the way from a case to its rows."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from bench import record
from bench.contestant import Entry, Ready, Unavailable, first_line
from bench.machine import Machine
from bench.record import RecordWriter, Row, parity_facts, timed
from bench.roofs import measure_roofs
from bench.timing import Call, Limits, Times
from encoder_fast.errors import BackendUnavailableError, UnsupportedModelError

Racer = Callable[[Machine, Mapping[str, Sequence[Call]], Limits], dict[str, Times]]

# Seconds for a whole suite. Together they keep `all` below 15 minutes on two CPU cores and below
# 9 on a GPU, and with --quick below 3.
_SECONDS = {
    ("cpu", False): {"kernels": 120, "models": 430, "latency": 90, "texts": 80},
    ("cpu", True): {"kernels": 25, "models": 60, "latency": 20, "texts": 20},
    ("gpu", False): {"kernels": 110, "models": 150, "latency": 50, "texts": 30},
    ("gpu", True): {"kernels": 40, "models": 30, "latency": 10, "texts": 8},
    # In miniature nothing is measured, and whoever asks wants to see all of it.
    ("fake", True): dict.fromkeys(("kernels", "models", "latency", "texts"), float("inf")),
}

# What building a compiled contestant may take; with less left it does not start.
_COMPILE_SECONDS = {"cpu": 45, "gpu": 10, "fake": 0}

# On a GPU contestants that compile come last and have seconds of their own. They take no time from
# the others, and a run that is stopped early lacks only them.
_COMPILED_SECONDS = {
    False: {"kernels": 60, "models": 90},
    True: {"kernels": 25, "models": 35},
}


class LostContextError(Exception):
    """Nothing more can run on the GPU in this process. The message says what broke it."""


@dataclass
class Session:
    """The state of a run.

    Attributes:
        wanted: words that a case's name must all hold; ``--filter``.
        own_texts: a file of texts that take the place of the suite's.
        minilm: the folder of the model of the texts, where it is not that of the package.
        broken: what of ours failed or was wrong.
        compiling: the cases are run once more, for those who compile, on a GPU.
    """

    machine: Machine
    writer: RecordWriter
    quick: bool = False
    wanted: tuple[str, ...] = ()
    own_texts: Path | None = None
    minilm: Path | None = None
    console: Console = field(default_factory=lambda: Console(highlight=False))
    broken: list[str] = field(default_factory=list)
    compiling: bool = False
    _deadline: float = float("inf")

    def roofs(self) -> dict[str, float]:
        """Measure the roofs of this run, once."""
        roofs = self.writer.header["roofs"]
        if not roofs:
            roofs = measure_roofs(self.machine, seconds=3 if self.quick else 8)
            self.writer.set_roofs(roofs)
            text = ", ".join(
                f"{name} {value / 1e9:,.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
                for name, value in roofs.items()
            )
            self.console.print(f"[bold]roofs[/] {text}")
        return roofs

    def begin(self, suite: str) -> None:
        """Start a suite and its clock."""
        seconds = _SECONDS[self.machine.kind, self.quick][suite]
        if self.compiling:
            seconds = _COMPILED_SECONDS[self.quick][suite]
        self._deadline = time.perf_counter() + seconds
        title = f"{suite}, compiled" if self.compiling else suite
        self.console.rule(f"[bold]{title}[/]", align="left", style="dim")

    @property
    def left(self) -> float:
        return self._deadline - time.perf_counter()

    @property
    def _can_compile(self) -> bool:
        return self.left >= _COMPILE_SECONDS[self.machine.kind]

    def turn(self, suite: str, case: str, facts: dict[str, Any]) -> bool:
        """Whether a case is to be run: it is wanted, and its suite's time is not up."""
        if not all(word in f"{suite} {case}" for word in self.wanted):
            return False
        if self.left > 0 or self.compiling:
            return True
        reason = "the suite's time is up"
        self.console.print(f"[dim]{case}: {reason}[/]")
        everybody = Row(suite, case, "everybody", False, record.SKIPPED, reason, facts)
        self.writer.add(everybody)
        return False

    def hold(
        self,
        suite: str,
        case: str,
        facts: dict[str, Any],
        entries: Sequence[Entry],
        racer: Racer,
        limits: Limits,
        extra: Callable[[str, Ready], dict[str, Any]] | None = None,
    ) -> None:
        """Build everybody, check them, time those who are right, and write a row for each.

        Those who compile on a GPU have a race of their own, beside the first of ours.

        Args:
            extra: further fields of a contestant's row, found out after the race.
        """
        if self.compiling:
            compiled = [entry for entry in entries if entry.compiles]
            if not compiled:
                return
            # Without the time to compile nobody is built, and each says why.
            beside = [e for e in entries if e.ours][:1] if self._can_compile else []
            entries = [*beside, *compiled]
        elif self.machine.is_gpu:
            entries = [entry for entry in entries if not entry.compiles]
        written = {e.label for e in entries if e.compiles or not self.compiling}
        self.console.print(f"[bold]{case}[/]")
        base = Row(suite, case, "", ours=False, status=record.OK, facts=facts)
        rows: dict[str, Row] = {}
        ready: dict[str, Ready] = {}
        for entry in entries:
            mine = replace(base, contestant=entry.label, ours=entry.ours, sources=entry.sources)
            built, row = self._build(entry, mine)
            rows[entry.label] = row
            if built is not None:
                ready[entry.label] = built
            elif row.status == record.FAILED and self.machine.has_lost_context:
                self._add(row)
                raise LostContextError(f"{case}, {entry.label}: {row.reason}")
        # An interrupt must not cost the reasons why somebody does not run.
        for label, row in rows.items():
            if label not in ready and label in written:
                self._add(row)
        if written & set(ready):
            self._race(ready, rows, written, racer, limits, extra)
        ready.clear()
        self.tidy()

    def _race(
        self,
        ready: Mapping[str, Ready],
        rows: Mapping[str, Row],
        written: Set[str],
        racer: Racer,
        limits: Limits,
        extra: Callable[[str, Ready], dict[str, Any]] | None,
    ) -> None:
        """Time all that are ready, and write the rows of `written`."""
        try:
            times = racer(self.machine, {k: v.calls for k, v in ready.items()}, limits)
        except Exception as error:
            # It is not known whose fault that is. The next case has contestants of its own.
            reason = f"the race ended with {first_line(error)}"
            for label in written & set(ready):
                self._add(self._no(rows[label], record.FAILED, reason))
            if self.machine.has_lost_context:
                raise LostContextError(f"{next(iter(rows.values())).case}: {reason}") from error
            return
        for label, taken in times.items():
            if label in written:
                more = self._found_out(extra, label, ready[label]) if extra else {}
                self._add(replace(rows[label], **timed(taken), **more))

    def _found_out(
        self, extra: Callable[[str, Ready], dict[str, Any]], label: str, ready: Ready
    ) -> dict[str, Any]:
        """Further fields of a row; none where the profiler is refused, which costs no times."""
        try:
            return extra(label, ready)
        except Exception as error:
            self.console.print(f"[dim]  {label}: {escape(first_line(error))}[/]")
            return {}

    def _no(self, row: Row, status: str, reason: str) -> Row:
        """The row of one who was not timed."""
        if status != record.SKIPPED and row.ours:
            self.broken.append(f"{row.case}, {row.contestant}: {reason}")
        return replace(row, status=status, reason=reason)

    def _build(self, entry: Entry, row: Row) -> tuple[Ready | None, Row]:
        if entry.compiles and not self._can_compile:
            reason = "too little of the suite's time is left to compile"
            return None, self._no(row, record.SKIPPED, reason)
        try:
            with self._limit(entry):
                built = entry.prepare()
        except (Unavailable, UnsupportedModelError, BackendUnavailableError) as error:
            # The first sentence says why; what else is supported is for a caller.
            return None, self._no(row, record.SKIPPED, str(error).partition(". ")[0])
        except Exception as error:
            # A peer that fails must not end the run; it stands in the record with its reason.
            return None, self._no(row, record.FAILED, first_line(error))
        row = replace(row, parity=parity_facts(built.parity), memory_bytes=built.memory_bytes)
        if not built.parity.ok:
            found = f"error {built.parity.error:.1e} where eager has "
            reason = f"{found}{built.parity.original_error:.1e}"
            return None, self._no(row, record.WRONG, reason)
        return built, row

    @contextmanager
    def _limit(self, entry: Entry) -> Iterator[None]:
        """Stops a compiler when its suite's time is up, on a GPU: its search could take all."""

        def stop(*_: object) -> None:
            raise Unavailable("it was still compiling when the suite's time was up")

        if not (entry.compiles and self.compiling):
            yield
            return
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(0.01, self.left))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _add(self, row: Row) -> None:
        self.writer.add(row)
        if row.status != record.OK:
            colour = "dim" if row.status == record.SKIPPED else "red"
            text = escape(f"  {row.contestant}: {row.status}, {row.reason}")
            self.console.print(text, style=colour, soft_wrap=True)
            return
        style = "bold green" if row.ours else ""
        line = f"  {row.contestant:<36} {row.median * 1e3:10.3f} ms  ±{row.spread / 2:4.0%}"
        self.console.print(line, style=style)

    def tidy(self) -> None:
        """Give memory back before the next case."""
        gc.collect()
        if self.machine.is_gpu:
            torch.cuda.empty_cache()
