"""The command line, ``encoder-fast``: one file a command.

A command imports PyTorch and transformers when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import encoder_fast
from encoder_fast.cli.bench import bench
from encoder_fast.cli.classify import classify
from encoder_fast.cli.demo import demo
from encoder_fast.cli.embed import embed
from encoder_fast.cli.errors import INTERRUPTED, UserError, first_line, say
from encoder_fast.cli.info import info
from encoder_fast.cli.parity import parity
from encoder_fast.cli.tag import tag

# Plain help: click's own layout keeps the examples' line breaks.
app = typer.Typer(
    name="encoder-fast",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Ctrl-C as one line and the status that a shell gives it."""

    @functools.wraps(command)
    def run(*arguments: object, **options: object) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            raise UserError("interrupted", INTERRUPTED) from None

    return run


for _command in (demo, info, embed, classify, tag, parity, bench):
    app.command()(_interruptible(_command))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"encoder-fast {encoder_fast.__version__}")
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Fast inference for Hugging Face encoder models.

    \b
    Examples:
      encoder-fast demo                        parity, speed and a search, on a real model
      encoder-fast demo --model ./my-bert      the same on a BERT of yours
      encoder-fast info                        what is installed here, and what runs
      encoder-fast embed lines.txt -m ./my-model -o vectors.npy
      encoder-fast classify tickets.csv --column body -m ./my-classifier -o labels.csv
      encoder-fast tag news.jsonl -m ./my-tagger -o entities.jsonl
      encoder-fast parity ./my-model           the same numbers, layer by layer
      encoder-fast bench ./my-model            how much faster it is on this machine
    """


def main() -> None:
    """Run a command. What goes wrong ends in one line on stderr and status 1, or 2 for usage.

    Python's own switch for developers, ``python -X dev``, gives tracebacks instead.
    """
    _occupy_standard_numbers()
    try:
        try:
            app()
        finally:
            _flush_output()
    except BrokenPipeError:
        # whoever reads the output has gone: the shell's own way to end a pipeline
        sys.exit(1)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        say(_told(error))
        sys.exit(error.status if isinstance(error, UserError) else 1)


def _told(error: Exception) -> str:
    ours = (
        UserError,
        encoder_fast.UnsupportedModelError,
        encoder_fast.BackendUnavailableError,
        encoder_fast.FallbackError,
    )
    if isinstance(error, ours):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {first_line(error)}"


def _occupy_standard_numbers() -> None:
    """Keep files from the numbers of standard streams that are closed: libraries write to these."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # the lowest free number, which is this one
            os.open(os.devnull, os.O_RDWR)


def _flush_output() -> None:
    """Write what is left to standard output, while an error can still be told."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python flushes again at exit, and must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"standard output: {error.strerror}") from None
