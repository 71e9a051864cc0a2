"""Results by the part, and the folder that holds those of an unfinished run.

A run that is interrupted leaves ``OUTPUT.unfinished/`` behind. There ``run.json`` says what was
run; ``parts`` has the results, one part after another; ``log`` has a line for each part that is
whole, with its checksum. A part without its line, or half a line, is what the interruption cut
short, and is dropped; so is a part that is damaged, with all that follow it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
        read: SHA-256 of all records up to the end of the part, as they were read.
        checksum: SHA-256 of the part and of this line's other values.
    """

    stop: int
    records: int
    cut: int
    tokens_per_batch: int
    read: str
    checksum: str = ""

    def signed(self, part: bytes) -> Entry:
        """The same with its checksum."""
        line = json.dumps(asdict(replace(self, checksum="")))
        digest = hashlib.sha256(line.encode())
        digest.update(part)
        return replace(self, checksum=digest.hexdigest())


class Unfinished:
    """The parts of one run, on disk; iterate it to read them again.

    No other run has the folder from here to the end of the ``with``, which removes it unless
    ``keep`` is set. A link in its place, or in place of one of its files, is never followed.

    Attributes:
        entries: the parts that are done.
        dropped: how many parts of an earlier run were damaged, or came after one that was.
        keep: whether what is there is of use to a later run.

    Raises:
        UserError: the folder is in use, or is not a folder.
        OSError: it can't be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[Entry] = []
        self.dropped = 0
        with ExitStack() as files:
            self._at = self._claim(files)
            self._files = files.pop_all()
        self.keep = self._has("run.json")

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        with self._files:
            if self.keep:
                return
            # run.json first: without it, what a kill leaves here is no run's. The lock last.
            for name in ("run.json", "log", "parts", "result", "run.json.new", "log.new", "lock"):
                with suppress(OSError):
                    os.unlink(name, dir_fd=self._at)
            with suppress(OSError):
                os.rmdir(self.folder)

    def begin(self, run: dict[str, Any], *, resume: bool, keeps: bool) -> None:
        """Take the folder for a run.

        Args:
            run: all that the results depend on. Only a run of the same is gone on with.
            resume: go on with what is there; else begin anew.
            keeps: whether parts from now on are of use to a later run.

        Raises:
            UserError: what is there is of another run, or damaged.
        """
        if resume and self._has("run.json"):
            self.entries = self._read(run)
        self._keeps = keeps
        if not self.entries:
            self.keep = False
            # in this order: no line of an older log may be taken for one of this run
            self._delete("log")
            self._replace("run.json", json.dumps(run, indent=1).encode())
        flags = os.O_WRONLY | os.O_APPEND
        if not self.entries:
            self._delete("parts")
            flags |= os.O_CREAT | os.O_EXCL
        self._parts = self._files.enter_context(_quietly_closed(self._open("parts", flags), "ab"))
        self._parts.truncate(self.entries[-1].stop if self.entries else 0)
        lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in self.entries)
        self._replace("log", lines.encode())
        log = self._open("log", os.O_WRONLY | os.O_APPEND)
        self._log = self._files.enter_context(_quietly_closed(log, "ab"))

    @property
    def records(self) -> int:
        """How many records are done."""
        return sum(entry.records for entry in self.entries)

    def append(self, part: Part, *, cut: int, tokens_per_batch: int, read: str) -> None:
        """Add a part; it is on disk when this returns."""
        data = _pack(part)
        self._parts.write(data)
        _to_disk(self._parts)
        stop = len(data) + (self.entries[-1].stop if self.entries else 0)
        entry = Entry(stop, len(part.ids), cut, tokens_per_batch, read).signed(data)
        self._log.write(json.dumps(asdict(entry)).encode() + b"\n")
        _to_disk(self._log)
        self.entries.append(entry)
        self.keep = self._keeps

    def __iter__(self) -> Iterator[Part]:
        with os.fdopen(self._open("parts", os.O_RDONLY), "rb") as file:
            for entry in self.entries:
                data = file.read(entry.stop - file.tell())
                if entry.signed(data) != entry:
                    raise UserError(f"{self.folder / 'parts'} is damaged: --resume mends it")
                yield _unpack(data)

    def create(self, name: str) -> BinaryIO:
        """A new file in the folder, in place of any of that name."""
        self._delete(name)
        return os.fdopen(self._open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")

    def move(self, name: str, target: Path) -> None:
        """Give a file of the folder another name, outside."""
        try:
            os.replace(name, target, src_dir_fd=self._at)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from None

    def _claim(self, files: ExitStack) -> int:
        """Lock the folder, new or old; returns its file descriptor."""
        while True:
            with ExitStack() as opened:
                with suppress(FileExistsError):
                    os.mkdir(self.folder)
                try:
                    self._at = _descriptor(
                        opened, os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                    )
                    lock = _descriptor(opened, self._open("lock", os.O_RDWR | os.O_CREAT))
                except FileNotFoundError:
                    # the run that had it has removed it just now
                    continue
                except NotADirectoryError:
                    raise UserError(f"{self.folder} is a link or a file, not a folder") from None
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"{self.folder} is in use by another run") from None
                # else it was removed before it was locked
                if os.fstat(lock).st_nlink == 1:
                    files.enter_context(opened.pop_all())
                    return self._at

    def _read(self, run: dict[str, Any]) -> list[Entry]:
        damaged = UserError(f"{self.folder} is damaged: --overwrite begins anew")
        try:
            before = json.loads(self._content("run.json"))
        except (ValueError, RecursionError):
            raise damaged from None
        if not isinstance(before, dict):
            raise damaged
        for name, value in run.items():
            if before.get(name) != value:
                raise UserError(
                    f"{self.folder} is of another run: {name} was {before.get(name)}, and is "
                    f"{value} now; --overwrite begins anew"
                )
        # behind the last newline is nothing, or half a line
        lines = self._content("log").split(b"\n")[:-1]
        entries = list(self._whole(lines))
        self.dropped = len(lines) - len(entries)
        return entries

    def _whole(self, lines: list[bytes]) -> Iterator[Entry]:
        """The log's entries up to the first that is damaged, or whose part is."""
        if not self._has("parts"):
            return
        with os.fdopen(self._open("parts", os.O_RDONLY), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for line in lines:
                try:
                    entry = Entry(**json.loads(line))
                    if not file.tell() < entry.stop <= size:
                        return
                    if entry.signed(file.read(entry.stop - file.tell())) != entry:
                        return
                except (ValueError, TypeError, RecursionError):
                    return
                yield entry

    def _has(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self._at, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _content(self, name: str) -> bytes:
        if not self._has(name):
            return b""
        with os.fdopen(self._open(name, os.O_RDONLY), "rb") as file:
            return file.read()

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError), self._named(name):
            os.unlink(name, dir_fd=self._at)

    def _replace(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        file = self.create(name + ".new")
        # closing it writes too
        with self._named(name), file:
            file.write(content)
            _to_disk(file)
        with self._named(name):
            os.replace(name + ".new", name, src_dir_fd=self._at, dst_dir_fd=self._at)

    def _open(self, name: str, flags: int) -> int:
        """A plain file of the folder, which has no other name: neither kind of link is followed."""
        with self._named(name):
            # a pipe would keep us waiting
            flags |= os.O_NOFOLLOW | os.O_NONBLOCK
            file = os.open(name, flags, 0o666, dir_fd=self._at)
        status = os.fstat(file)
        if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
            return file
        os.close(file)
        raise self._not_plain(name)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Errors with the whole path of one of the folder's files."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._not_plain(name) from None
            raise OSError(error.errno, error.strerror, str(self.folder / name)) from None

    def _not_plain(self, name: str) -> UserError:
        return UserError(f"{self.folder / name} is a link, a pipe or a folder, not a plain file")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    unfinished = path.with_name(path.name + ".new")
    # a link of that name is removed, and not followed
    unfinished.unlink(missing_ok=True)
    with open(unfinished, "xb") as file:
        file.write(content)
        _to_disk(file)
    unfinished.replace(path)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _descriptor(files: ExitStack, descriptor: int) -> int:
    files.callback(os.close, descriptor)
    return descriptor


@contextmanager
def _quietly_closed(descriptor: int, mode: str) -> Iterator[Any]:
    file = os.fdopen(descriptor, mode)
    try:
        yield file
    finally:
        # what can't be written any more is a part without its line
        with suppress(OSError):
            file.close()


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
