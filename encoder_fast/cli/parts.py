"""Results by the part, and the folder that holds those of an unfinished run.

A run that is interrupted leaves ``OUTPUT.unfinished/`` behind. There ``run.json`` says what was
run; ``parts`` has the results, one part after another; ``log`` has a line for each part that is
whole. A part without its line, or half a line, is what the interruption cut short, and is dropped.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from encoder_fast.cli.errors import UserError


class Part(NamedTuple):
    """The results of some records that follow one another.

    Attributes:
        ids: what each record is called.
        results: a vector each, ``(n, D)``, or an object of JSON's types each.
    """

    ids: list[str | int]
    results: np.ndarray | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the log.

    Attributes:
        stop: where the part ends in the file of parts.
        records: how many it has.
        cut: how many of their texts were cut.
        tokens_per_batch: what a batch may hold from here on: less than at the start where memory
            ran out.
    """

    stop: int
    records: int
    cut: int
    tokens_per_batch: int


class Unfinished:
    """The parts of one run, on disk; iterate it to read them again.

    Args:
        folder: where they are.
        run: all that the results depend on. Only a run of the same is gone on with.
        resume: go on with what is there; else begin anew.

    Raises:
        UserError: what is there is of another run, or is being written by one right now.
    """

    def __init__(self, folder: Path, run: dict[str, Any], *, resume: bool) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        with ExitStack() as files:
            lock = files.enter_context((folder / "lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{folder} is in use by another run") from None
            self.entries = self._read(run) if resume and (folder / "run.json").is_file() else []
            if not self.entries:
                replace_file(folder / "run.json", json.dumps(run, indent=1).encode())
            self._parts = files.enter_context((folder / "parts").open("ab"))
            self._parts.truncate(self.entries[-1].stop if self.entries else 0)
            lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in self.entries)
            replace_file(folder / "log", lines.encode())
            self._log = files.enter_context((folder / "log").open("a"))
            self._files = files.pop_all()

    @property
    def records(self) -> int:
        """How many records are done."""
        return sum(entry.records for entry in self.entries)

    def append(self, part: Part, *, cut: int, tokens_per_batch: int) -> None:
        """Add a part; it is on disk when this returns."""
        self._parts.write(_pack(part))
        _to_disk(self._parts)
        entry = Entry(self._parts.tell(), len(part.ids), cut, tokens_per_batch)
        self._log.write(json.dumps(asdict(entry)) + "\n")
        _to_disk(self._log)
        self.entries.append(entry)

    def __iter__(self) -> Iterator[Part]:
        with open(self.folder / "parts", "rb") as file:
            for entry in self.entries:
                yield _unpack(file.read(entry.stop - file.tell()))

    def close(self) -> None:
        """Leave everything as it is."""
        # what can't be written any more is a part without its line
        with suppress(OSError):
            self._files.close()

    def remove(self) -> None:
        """Delete the folder, once the results are somewhere else."""
        self.close()
        shutil.rmtree(self.folder)

    def _read(self, run: dict[str, Any]) -> list[Entry]:
        try:
            before = json.loads((self.folder / "run.json").read_bytes())
        except ValueError:
            raise UserError(f"{self.folder} is damaged: --overwrite begins anew") from None
        for name, value in run.items():
            if before.get(name) != value:
                raise UserError(
                    f"{self.folder} is of another run: {name} was {before.get(name)}, and is "
                    f"{value} now; --overwrite begins anew"
                )
        size = os.path.getsize(self.folder / "parts") if (self.folder / "parts").exists() else 0
        entries: list[Entry] = []
        log = self.folder / "log"
        for line in log.read_text().splitlines() if log.exists() else []:
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):
                break
            if entry.stop > size:
                break
            entries.append(entry)
        return entries


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    unfinished = path.with_name(path.name + ".new")
    with open(unfinished, "wb") as file:
        file.write(content)
        _to_disk(file)
    unfinished.replace(path)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _pack(part: Part) -> bytes:
    """A line of JSON with the ids and with results of JSON's types; then vectors, as ``.npy``."""
    if isinstance(part.results, list):
        return json.dumps([part.ids, part.results]).encode() + b"\n"
    vectors = io.BytesIO()
    np.save(vectors, part.results, allow_pickle=False)
    return json.dumps([part.ids]).encode() + b"\n" + vectors.getvalue()


def _unpack(data: bytes) -> Part:
    line, _, rest = data.partition(b"\n")
    ids, *results = json.loads(line)
    if results:
        return Part(ids, results[0])
    return Part(ids, np.load(io.BytesIO(rest), allow_pickle=False))
