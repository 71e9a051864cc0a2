"""The command line: options in, sections out. What is computed is in the other files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from examples.ticket_routing.errors import TicketError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def ticket_routing(
    csv: Annotated[
        Path | None,
        typer.Option(help="A csv with a header.", show_default="the synthetic sample"),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Its column of texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Its column of labels.")] = "label",
    cut: Annotated[
        int | None,
        typer.Option(min=1, help="Read so many characters of a ticket.", show_default="all"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A folder or hub name.", show_default="the packaged all-MiniLM-L6-v2"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="PyTorch's choice")
    ] = None,
    accuracy: Annotated[
        float,
        typer.Option(min=0, max=1, help="How often what is sent unseen shall be right."),
    ] = 0.9,
    rate: Annotated[float, typer.Option(min=0.1, help="Tickets a second.")] = 25,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a measurement.")] = 10,
    fewest: Annotated[
        int, typer.Option(min=1, help="It goes on until so many tickets have come.")
    ] = 200,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, help="How long a ticket waits for company at most.")
    ] = 2,
    budget: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in a batch.", show_default="1024, on a GPU 16384"),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Raise the rate, patched beside unpatched.")
    ] = False,
    rates: Annotated[
        str | None,
        typer.Option(help="Rates for --sweep, as 20,40,60.", show_default="by throughput"),
    ] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option(help="Join in the rates of an earlier --sweep, by its --out file."),
    ] = None,
    limit_ms: Annotated[float, typer.Option(min=0.1, help="What p99 must stay below.")] = 50,
    plot: Annotated[
        Path | None, typer.Option(help="Draw latency against rate to this PNG; needs --sweep.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write every figure to this JSON file.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split and of the arrivals.")] = 0,
) -> None:
    """Route support tickets to departments: train, judge, and serve a live stream.

    \b
    Examples:
      python -m examples.ticket_routing
      python -m examples.ticket_routing --rate 60 --seconds 20
      python -m examples.ticket_routing --sweep --cut 500 --dtype bfloat16
      python -m examples.ticket_routing --sweep --plot latency.png --out figures.json
      python -m examples.ticket_routing --csv mine.csv --text-column body --label-column team
    """
    if plot is not None and not sweep:
        raise TicketError("--plot needs --sweep: one rate makes no curve")
    if add and not sweep:
        raise TicketError("--add needs --sweep")
    for path in add or []:
        if not path.is_file():
            raise TicketError(f"--add {path}: no such file")
    for name, path in (("--plot", plot), ("--out", out)):
        if path is not None and not path.absolute().parent.is_dir():
            raise TicketError(f"{name} {path}: no such folder to write to")
    wanted_rates = None if rates is None else _parse_rates(rates)
    # PyTorch and transformers load here, so that --help answers at once
    from examples.ticket_routing import program

    program.run(
        program.Options(
            csv=csv,
            text_column=text_column,
            label_column=label_column,
            cut=cut,
            model=model,
            device=device,
            dtype=dtype,
            threads=threads,
            accuracy=accuracy,
            rate=rate,
            seconds=seconds,
            fewest=fewest,
            max_wait=max_wait_ms / 1e3,
            budget=budget,
            sweep=sweep,
            rates=wanted_rates,
            add=add or [],
            limit=limit_ms / 1e3,
            plot=plot,
            out=out,
            seed=seed,
        )
    )


def _parse_rates(text: str) -> list[float]:
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        rates = []
    if not rates or min(rates) <= 0:
        raise TicketError(f"--rates {text}: numbers above 0 are needed, as in 20,40,60")
    return rates


def main() -> None:
    """Run it. A user's mistake ends in one line on stderr and status 1, or 2 for usage."""
    try:
        app()
    except TicketError as error:
        print(f"ticket_routing: {error}", file=sys.stderr)
        sys.exit(1)
