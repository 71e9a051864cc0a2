"""A run over a whole input: streamed, resumable, and its output there whole or not at all.

Memory holds the records of two blocks. A block's results go to a folder beside the output when it
is done (:mod:`encoder_fast.cli.parts`); at the end they become the output, which takes its name by
a rename. Blocks begin at the same records in every run and nothing is carried from one to the next,
so a run that was interrupted ends with the same bytes as one that was not.

The input is read twice, and hashed both times: results are of the records that were hashed first,
or there are none.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from encoder_fast.cli.errors import INTERRUPTED, UselessError, UserError, first_line, say
from encoder_fast.cli.loading import ModelChoice, fingerprint, load_encoder
from encoder_fast.cli.output import Output
from encoder_fast.cli.parts import Part, Unfinished
from encoder_fast.cli.records import STANDARD, Record, Source
from encoder_fast.cli.writing import Writer

if TYPE_CHECKING:
    from encoder_fast.text import TextEncoder

Results = np.ndarray | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Job:
    """What a command does with its input.

    Attributes:
        choice: the model and how it runs.
        stream: from the encoder, texts and whether progress is shown to the results of a block of
            texts after another.
        empty: the results of no text.
        writer: for the output's format.
        options: the command and those of its options that change results.
        finish: from the parts of the whole run to those that are written.
        check: raises where the output can't be made of so many records.
        quiet: show nothing but errors.
    """

    source: Source
    output: Output
    choice: ModelChoice
    stream: Callable[[TextEncoder, Iterable[str], bool], Iterator[Results]]
    empty: Callable[[TextEncoder], Results]
    writer: Callable[[TextEncoder], Writer]
    options: dict[str, Any]
    finish: Callable[[Unfinished], Iterable[Part]] = iter
    check: Callable[[int], None] = lambda count: None
    quiet: bool = False

    def run(self) -> None:
        """Run it all.

        Raises:
            UserError: something is wrong with the input, the model or the output.
        """
        self.output.check_against(self.source)
        if self.output.is_stream:
            self._run(None)
            return
        with Unfinished(self.output.unfinished) as unfinished:
            # once more: another run may have ended in the meantime
            self.output.check()
            self._run(unfinished)

    def _run(self, unfinished: Unfinished | None) -> None:
        start = time.perf_counter()
        may_be_done = unfinished is not None and self.output.may_be_done
        read = self._scan() if self.source.rereadable or may_be_done else None
        if read is not None:
            self.check(read.count)
        encoder = load_encoder(self.choice)
        running = _Running(self, encoder, read)
        if unfinished is None:
            running.to_stream()
        elif may_be_done:
            running.is_done(unfinished)
            return
        else:
            running.to_file(unfinished)
        running.summary(time.perf_counter() - start)

    def _scan(self) -> _Read:
        """Read the whole input once, so that a broken record is found before hours of work."""
        read = _Read()
        for record in self.source:
            read.add(record)
        return read

    def identity(self, encoder: TextEncoder, read: _Read | None) -> dict[str, Any]:
        """All that the results depend on, down to the last bit."""
        import torch
        import transformers

        import encoder_fast

        return {
            **self.options,
            "input": "a pipe" if read is None else f"{read.count} records, SHA-256 {read.digest}",
            "model": f"SHA-256 {fingerprint(encoder)}",
            "device": str(encoder.model.device),
            "dtype": str(encoder.model.dtype),
            "backend": self.choice.backend,
            "max tokens per batch": self.choice.max_tokens_per_batch,
            "threads": torch.get_num_threads(),
            "encoder_fast": encoder_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


class _Read:
    """How many records were read, and a hash of them all."""

    def __init__(self) -> None:
        self.count = 0
        self._sha256 = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._sha256.hexdigest()

    def add(self, record: Record) -> None:
        self.count += 1
        self._sha256.update(json.dumps(record).encode())


class _Running:
    """One run of a job; ``read`` is what its input was at the first reading, if it had one."""

    def __init__(self, job: Job, encoder: TextEncoder, read: _Read | None) -> None:
        self.job = job
        self.encoder = encoder
        self.read = read
        self.count = None if read is None else read.count
        self.done = self.before = self.cut = 0
        # of the records before that one
        self.read_before = ""

    def to_stream(self) -> None:
        """Write results as they come."""
        job = self.job
        parts = chain([Part([], job.empty(self.encoder))], (part for part, *_ in self._parts()))
        with self._errors():
            if job.output.path == STANDARD:
                job.writer(self.encoder)(parts, sys.stdout.buffer)
                sys.stdout.buffer.flush()
                return
            with open(job.output.path, "wb") as file:
                job.writer(self.encoder)(parts, file)

    def to_file(self, unfinished: Unfinished) -> None:
        """Collect results beside the output; make the output of them once they are whole."""
        output = self.job.output
        identity = self.job.identity(self.encoder, self.read)
        unfinished.begin(identity, resume=output.resume, keeps=self.read is not None)
        with self._errors(unfinished):
            self._go_on(unfinished)
            for part, cut, read in self._parts():
                budget = self.encoder.tokens_per_batch
                unfinished.append(part, cut=cut, tokens_per_batch=budget, read=read)
                self.done += len(part.ids)
            with unfinished.create("result") as file:
                self._write(unfinished, file)
                file.flush()
                os.fsync(file.fileno())
                output.mark(file.fileno(), self.job.identity(self.encoder, self.read))
            if output.may_be_done:
                raise UserError(f"{output.path} is there now: --resume --overwrite replaces it")
            unfinished.move("result", output.target)
            unfinished.keep = False

    def is_done(self, unfinished: Unfinished) -> None:
        """Leave a finished output as it is, if this run would write the same.

        Raises:
            UserError: it would not.
        """
        identity = self.job.identity(self.encoder, self.read)
        self.job.output.check_done(identity)
        # a run that was killed at its very end left these
        with suppress(UserError, OSError):
            unfinished.begin(identity, resume=True, keeps=False)
            unfinished.keep = False
        self._say(f"{self.job.output.path} is done already")

    def _kept(self, unfinished: Unfinished | None) -> str:
        if unfinished is None or not unfinished.keep:
            return ""
        return (
            f"; {self.done:,} of {self.count:,} records are kept in {self.job.output.unfinished}: "
            "--resume goes on"
        )

    @contextmanager
    def _errors(self, unfinished: Unfinished | None = None) -> Iterator[None]:
        """Make a :class:`UserError` of what can go wrong while the model runs."""
        from encoder_fast.text.batching import is_out_of_memory
        from encoder_fast.text.chunking import TextTooLongError

        try:
            yield
        except KeyboardInterrupt:
            raise UserError(f"interrupted{self._kept(unfinished)}", INTERRUPTED) from None
        except UselessError:
            if unfinished is not None:
                unfinished.keep = False
            raise
        except (UserError, BrokenPipeError):
            raise
        except OSError as error:
            where = error.filename or self.job.output.path
            what = error.strerror or first_line(error)
            raise UserError(f"{where}: {what}{self._kept(unfinished)}") from error
        except TextTooLongError as error:
            if unfinished is not None:
                unfinished.keep = False
            raise UserError(
                f"record {error.index + self.before} has {error.tokens:,} tokens and "
                f"{error.room:,} fit: --long-text truncate or chunk"
            ) from None
        except Exception as error:
            what = first_line(error)
            if is_out_of_memory(error):
                what = "memory ran out over one single text"
            elif not isinstance(error, (ValueError, IndexError)):
                what = f"{type(error).__name__}: {what}"
            raise UserError(f"{what}{self._kept(unfinished)}") from error

    def _go_on(self, unfinished: Unfinished) -> None:
        self.done = self.before = unfinished.records
        self.cut = sum(entry.cut for entry in unfinished.entries)
        if unfinished.dropped:
            self._say(f"{unfinished.dropped:,} blocks that were kept are damaged: made again")
        if unfinished.entries:
            self.encoder.tokens_per_batch = unfinished.entries[-1].tokens_per_batch
            self.read_before = unfinished.entries[-1].read
            self._say(f"going on after {self.done:,} of {self.count:,} records")

    def _write(self, unfinished: Unfinished, file: BinaryIO) -> None:
        first = Part([], self.job.empty(self.encoder))
        self.job.writer(self.encoder)(chain([first], self.job.finish(unfinished)), file)

    def _parts(self) -> Iterator[tuple[Part, int, str]]:
        """Results by the block, how many of its texts were cut, and a hash of all read so far."""
        job, first = self.job, self.before
        read = _Read()
        # of the records whose results are to come: what they are called, and the hash up to them
        waiting: deque[tuple[str | int, str]] = deque()

        def texts() -> Iterator[str]:
            # records that were added to the input since its first reading are none of this run's
            for record in self._unchanged(islice(job.source, self.count)):
                read.add(record)
                if read.count <= first:
                    # what an earlier run read might have been changed back since
                    if read.count == first and read.digest != self.read_before:
                        raise self._changed()
                    continue
                waiting.append((record.id, read.digest))
                yield record.text

        number = first
        given = texts() if self.count is None else _Sized(texts(), self.count - first)
        show = sys.stderr is not None and sys.stderr.isatty() and not job.quiet
        with warnings.catch_warnings():
            # the summary says how many texts were cut
            warnings.filterwarnings("ignore", message=".* were longer than")
            before = self.encoder.report().cut
            for results in job.stream(self.encoder, given, show):
                if isinstance(results, np.ndarray):
                    _check_finite(results, number)
                number += len(results)
                cut = self.encoder.report().cut - before
                before += cut
                self.cut += cut
                done = [waiting.popleft() for _ in range(len(results))]
                yield Part([name for name, _ in done], results), cut, done[-1][1]
        if self.read is not None and (number, read.digest) != (self.count, self.read.digest):
            raise self._changed()
        self.read, self.count = read, number

    def _unchanged(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records of the second reading: what is broken in them was not so in the first."""
        try:
            yield from records
        except UserError:
            if self.read is None:
                raise
            raise self._changed() from None

    def _changed(self) -> UserError:
        return UselessError(f"{self.job.source.name} was changed while it was read")

    def summary(self, seconds: float) -> None:
        ran = (self.count or 0) - self.before
        self._say(
            f"{self.count:,} records in {self.job.output.path}; {ran:,} in {seconds:.1f} s, "
            f"{ran / seconds:,.0f} a second"
        )
        if self.cut:
            self._say(
                f"{self.cut:,} of {self.count:,} texts were longer than "
                f"{self.encoder.max_length} tokens and were cut: --long-text chunk reads all of a "
                "text"
            )

    def _say(self, message: str) -> None:
        if not self.job.quiet:
            say(message)


class _Sized:
    """An iterator whose length is known: a progress bar's total."""

    def __init__(self, texts: Iterator[str], count: int) -> None:
        self._texts = texts
        self._count = count

    def __iter__(self) -> Iterator[str]:
        return self._texts

    def __len__(self) -> int:
        return self._count


def _check_finite(vectors: np.ndarray, first: int) -> None:
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise UselessError(
            f"the vector of record {first + wrong[0]} is not finite: the model overflows; "
            "--dtype float32 has a wider range"
        )
