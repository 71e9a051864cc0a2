"""The command line, ``encoder-fast``: one file a command.

A command imports PyTorch and transformers when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import encoder_fast
from encoder_fast.cli.demo import demo
from encoder_fast.cli.errors import UserError
from encoder_fast.cli.info import info

# Plain help: click's own layout keeps the examples' line breaks.
app = typer.Typer(
    name="encoder-fast",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(info)


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
    """


def main() -> None:
    """Run a command. A user's mistake ends in one line on stderr and status 1, or 2 for usage."""
    try:
        app()
    except (
        UserError,
        encoder_fast.UnsupportedModelError,
        encoder_fast.BackendUnavailableError,
        encoder_fast.FallbackError,
    ) as error:
        print(f"encoder-fast: {error}", file=sys.stderr)
        sys.exit(1)
