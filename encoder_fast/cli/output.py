"""Where a command's results go, checked before anything runs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from encoder_fast.cli.errors import UserError
from encoder_fast.cli.records import STANDARD, import_pyarrow

_SUFFIXES = {
    ".npy": "npy",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}


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
        self.format = format or self._guess(formats)
        if self.format not in formats:
            raise UserError(f"--format {self.format}: this command has {', '.join(formats)}")
        target = Path(os.path.realpath(path))
        exists = path != STANDARD and target.exists()
        self.is_stream = path == STANDARD or (exists and not stat.S_ISREG(target.stat().st_mode))
        self.target = target
        self.unfinished = target.with_name(target.name + ".unfinished")
        if self.is_stream:
            if exists and target.is_dir():
                raise UserError(f"--output {path} is a folder, not a file")
            if self.format not in ("jsonl", "csv"):
                raise UserError(f"{self.format} can't be written to a pipe: give a file")
            if resume:
                raise UserError("--resume needs an output that is a file")
        elif exists and not overwrite:
            raise UserError(f"{path} exists: --overwrite replaces it once the new one is whole")
        elif self.unfinished.exists() and not (overwrite or resume):
            raise UserError(
                f"{self.unfinished} is what an interrupted run left: --resume goes on with it, "
                "--overwrite begins anew"
            )
        elif not target.parent.is_dir():
            raise UserError(f"--output {path}: no such folder to write to")
        if self.format == "parquet":
            import_pyarrow()

    def _guess(self, formats: tuple[str, ...]) -> str:
        if self.path == STANDARD:
            return "jsonl"
        suffix = Path(self.path).suffix.lower()
        if suffix not in _SUFFIXES:
            raise UserError(
                f"{self.path}: the name does not tell the format; give --format {'|'.join(formats)}"
            )
        return _SUFFIXES[suffix]
