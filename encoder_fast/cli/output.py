"""Where a command's results go, checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from encoder_fast.cli.errors import UserError
from encoder_fast.cli.records import STANDARD, Source, import_pyarrow

_SUFFIXES = {
    ".npy": "npy",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}


# An attribute of the finished file, which no program that reads the file sees.
_MARK = "user.encoder_fast.run"

# How a run was done, not what: once it is done no results of two kinds can be mixed.
_PLACE = ("device", "threads", "encoder_fast", "torch", "transformers")


class Output:
    """Where results go.

    Attributes:
        path: the file; ``-`` is standard output.
        format: one of those that the command has.
        is_stream: written as it comes, as a pipe has to be.
        unfinished: the folder of a run that is not done.

    Raises:
        UserError: it can't be written there, or something is there already.
    """

    def __init__(
        self,
        path: str,
        format: str | None,
        formats: tuple[str, ...],
        *,
        overwrite: bool,
        resume: bool,
    ) -> None:
        self.path = path
        self.resume = resume
        self.overwrite = overwrite
        self.format = format or self._guess(formats)
        if self.format not in formats:
            raise UserError(f"--format {self.format}: this command has {', '.join(formats)}")
        if path == STANDARD and sys.stdout is None:
            raise UserError("standard output is closed")
        mode = None if path == STANDARD else self._mode()
        self.is_stream = path == STANDARD or (mode is not None and not stat.S_ISREG(mode))
        if not self.is_stream and Path(path).is_symlink():
            raise UserError(f"--output {path} is a symbolic link: give the file that it points to")
        self.target = Path(os.path.realpath(path))
        self.unfinished = self.target.with_name(self.target.name + ".unfinished")
        if self.is_stream:
            if mode is not None and stat.S_ISDIR(mode):
                raise UserError(f"--output {path} is a folder, not a file")
            if self.format not in ("jsonl", "csv"):
                raise UserError(f"{self.format} can't be written to a pipe: give a file")
            if resume:
                raise UserError("--resume needs an output that is a file")
        else:
            self.check()
            if not self.target.parent.is_dir():
                raise UserError(f"--output {path}: no such folder to write to")
        if self.format == "parquet":
            import_pyarrow()

    def check(self) -> None:
        """Raise :class:`UserError` where results that are there would be lost."""
        if self.overwrite:
            return
        if os.path.lexists(self.target):
            if not (self.resume and self._mark()):
                raise UserError(
                    f"{self.path} exists: --overwrite replaces it once the new one is whole"
                )
        elif not self.resume and os.path.lexists(self.unfinished / "run.json"):
            raise UserError(
                f"{self.unfinished} is what an interrupted run left: --resume goes on with it, "
                "--overwrite begins anew"
            )

    def check_against(self, source: Source) -> None:
        """Raise :class:`UserError` where the output would replace its own input."""
        if not source.rereadable or self.is_stream:
            return
        with suppress(FileNotFoundError):
            if os.path.samefile(source.path, self.target):
                raise UserError(f"--output {self.path} is the input: give another file")

    @property
    def may_be_done(self) -> bool:
        """Whether there is a finished output that stays."""
        return not self.overwrite and os.path.lexists(self.target)

    def mark(self, file: int, run: dict[str, Any]) -> None:
        """Note on a finished file what it is the result of, where its file system allows that."""
        # only Linux has these attributes, and not each of its file systems
        with suppress(OSError, AttributeError):
            os.setxattr(file, _MARK, self._digest(run, os.fstat(file)))

    def check_done(self, run: dict[str, Any]) -> None:
        """Raise :class:`UserError` unless the output is there, unchanged and of such a run."""
        if self._mark() != self._digest(run, os.stat(self.target)):
            raise UserError(
                f"{self.path} exists and is not the result of this command and input: --overwrite "
                "replaces it once the new one is whole"
            )

    def _mark(self) -> bytes:
        with suppress(OSError, AttributeError):
            return os.getxattr(self.target, _MARK, follow_symlinks=False)
        return b""

    def _digest(self, run: dict[str, Any], status: os.stat_result) -> bytes:
        kept = {name: value for name, value in run.items() if name not in _PLACE}
        mark = json.dumps([self.format, kept, status.st_size, status.st_mtime_ns])
        return hashlib.sha256(mark.encode()).hexdigest().encode()

    def _mode(self) -> int | None:
        try:
            return os.stat(self.path).st_mode
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"--output {self.path}: {error.strerror}") from None

    def _guess(self, formats: tuple[str, ...]) -> str:
        if self.path == STANDARD:
            return "jsonl"
        suffix = Path(self.path).suffix.lower()
        if suffix not in _SUFFIXES:
            raise UserError(
                f"{self.path}: the name does not tell the format; give --format {'|'.join(formats)}"
            )
        return _SUFFIXES[suffix]
