"""A run over a whole input: streamed, resumable, and its output there whole or not at all.

Memory holds the records of two blocks. A block's results go to a folder beside the output when it
is done (:mod:`encoder_fast.cli.parts`); at the end they become the output, which takes its name by
a rename. Blocks begin at the same records in every run and nothing is carried from one to the next,
so a run that was interrupted ends with the same bytes as one that was not.
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
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from encoder_fast.cli.errors import INTERRUPTED, UserError, first_line
from encoder_fast.cli.loading import ModelChoice, fingerprint, load_encoder
from encoder_fast.cli.output import Output
from encoder_fast.cli.parts import Part, Unfinished
from encoder_fast.cli.records import STANDARD, Source
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
        start = time.perf_counter()
        digest, count = self._scan() if self.source.rereadable else (None, None)
        if count is not None:
            self.check(count)
        encoder = load_encoder(self.choice)
        running = _Running(self, encoder, count)
        if self.output.is_stream:
            running.to_stream()
        else:
            running.to_file(self._identity(encoder, digest, count))
        running.summary(time.perf_counter() - start)

    def _scan(self) -> tuple[str, int]:
        """Read the whole input once, so that a broken record is found before hours of work."""
        digest, count = hashlib.sha256(), 0
        for record in self.source:
            digest.update(json.dumps(record).encode())
            count += 1
        return digest.hexdigest(), count

    def _identity(
        self, encoder: TextEncoder, digest: str | None, count: int | None
    ) -> dict[str, Any]:
        """All that the results depend on, down to the last bit."""
        import torch
        import transformers

        import encoder_fast

        return {
            **self.options,
            "input": f"{count} records, SHA-256 {digest}",
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


class _Running:
    """One run of a job."""

    def __init__(self, job: Job, encoder: TextEncoder, count: int | None) -> None:
        self.job = job
        self.encoder = encoder
        self.count = count
        self.done = self.before = self.cut = 0

    def to_stream(self) -> None:
        """Write results as they come."""
        job = self.job
        parts = chain([Part([], job.empty(self.encoder))], (part for part, _ in self._parts()))
        with self._errors():
            if job.output.path == STANDARD:
                job.writer(self.encoder)(parts, sys.stdout.buffer)
                sys.stdout.buffer.flush()
                return
            with open(job.output.path, "wb") as file:
                job.writer(self.encoder)(parts, file)

    def to_file(self, identity: dict[str, Any]) -> None:
        """Collect results beside the output; make the output of them once they are whole."""
        job = self.job
        folder = job.output.unfinished
        unfinished: Unfinished | None = None
        finished = False
        try:
            with self._errors():
                unfinished = Unfinished(folder, identity, resume=job.output.resume)
                self._go_on(unfinished)
                for part, cut in self._parts():
                    budget = self.encoder.tokens_per_batch
                    unfinished.append(part, cut=cut, tokens_per_batch=budget)
                    self.done += len(part.ids)
                with open(folder / "result", "wb") as file:
                    self._write(unfinished, file)
                    file.flush()
                    os.fsync(file.fileno())
                (folder / "result").replace(job.output.target)
                finished = True
        finally:
            if unfinished is not None and (finished or not self._keeps):
                unfinished.remove()
            elif unfinished is not None:
                unfinished.close()

    @property
    def _keeps(self) -> bool:
        """Whether what is done is of use to a later run."""
        return self.job.source.rereadable and self.done > 0

    def _kept(self) -> str:
        if not self._keeps:
            return ""
        return (
            f"; {self.done:,} of {self.count:,} records are kept in {self.job.output.unfinished}: "
            "--resume goes on"
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Make a :class:`UserError` of what can go wrong while the model runs."""
        from encoder_fast.text.batching import is_out_of_memory
        from encoder_fast.text.chunking import TextTooLongError

        try:
            yield
        except KeyboardInterrupt:
            raise UserError(f"interrupted{self._kept()}", INTERRUPTED) from None
        except UserError as error:
            raise UserError(f"{error}{self._kept()}", error.status) from None
        except BrokenPipeError:
            # whoever reads the output has gone: the shell's own way to end a pipeline
            raise
        except OSError as error:
            where = error.filename or self.job.output.path
            raise UserError(f"{where}: {error.strerror or error}{self._kept()}") from error
        except TextTooLongError as error:
            raise UserError(
                f"record {error.index + self.before} has {error.tokens:,} tokens and "
                f"{error.room:,} fit: --long-text truncate or chunk"
            ) from None
        except (ValueError, IndexError) as error:
            raise UserError(f"{first_line(error)}{self._kept()}") from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"memory ran out over one single text{self._kept()}") from error

    def _go_on(self, unfinished: Unfinished) -> None:
        self.done = self.before = unfinished.records
        self.cut = sum(entry.cut for entry in unfinished.entries)
        if unfinished.entries:
            self.encoder.tokens_per_batch = unfinished.entries[-1].tokens_per_batch
            self._say(f"going on after {self.done:,} of {self.count:,} records")

    def _write(self, unfinished: Unfinished, file: BinaryIO) -> None:
        first = Part([], self.job.empty(self.encoder))
        self.job.writer(self.encoder)(chain([first], self.job.finish(unfinished)), file)

    def _parts(self) -> Iterator[tuple[Part, int]]:
        """Results by the block, each with how many of its texts were cut."""
        job, first = self.job, self.before
        ids: deque[str | int] = deque()

        def texts() -> Iterator[str]:
            for record in islice(job.source, first, None):
                ids.append(record.id)
                yield record.text

        number = first
        given = texts() if self.count is None else _Sized(texts(), self.count - first)
        show = sys.stderr.isatty() and not job.quiet
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
                yield Part([ids.popleft() for _ in range(len(results))], results), cut
        if self.count is not None and number != self.count:
            raise UserError(f"{job.source.name} was changed while it was read")
        self.count = number

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
            print(f"encoder-fast: {message}", file=sys.stderr)


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
        raise UserError(
            f"the vector of record {first + wrong[0]} is not finite: the model overflows; "
            "--dtype float32 has a wider range"
        )
