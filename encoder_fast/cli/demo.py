"""``encoder-fast demo``: what encoder_fast does for a real model, on this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encoder_fast.cli.errors import UserError
from encoder_fast.cli.tables import heading, show_batch, show_method, table

if TYPE_CHECKING:
    from rich.console import Console

    from encoder_fast.cli.demo_run import Answer, Demo, DemoResult, Place
    from encoder_fast.parity import ParityReport


def demo(
    model: Annotated[
        Path | None,
        typer.Option(
            help="A folder with a BERT and its tokenizer.", show_default="all-MiniLM-L6-v2"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="PyTorch's choice")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small batches, three rounds.")] = False,
    seed: Annotated[int, typer.Option(help="Which texts are drawn for the timed batches.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write every figure to this JSON file.")] = None,
) -> None:
    """Patch a real model: parity, throughput and a semantic search.

    Runs on the GPU where there is one that encoder_fast can use.

    \b
    Examples:
      encoder-fast demo
      encoder-fast demo --quick --threads 2
      encoder-fast demo --model ./my-bert --out figures.json
    """
    from rich.console import Console

    if model is not None and not os.path.isdir(model):
        raise UserError(f"--model {model}: no such folder")
    if out is not None and not os.path.isdir(out.absolute().parent):
        raise UserError(f"--out {out}: no such folder to write to")
    console = Console(highlight=False)
    with console.status("loading"):
        import torch

        from encoder_fast.cli.demo_run import Demo

        if threads is not None:
            torch.set_num_threads(threads)
        running = Demo(model, quick=quick, seed=seed)
    result = show(running, console)
    if out is not None:
        from encoder_fast.cli.record import write_record

        try:
            write_record(out, result)
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}") from None
        console.print(f"Every figure is in {out}.")
    if not result.ok:
        raise UserError("the parity rule is broken: the patched model's numbers are not right")


def show(running: Demo, console: Console) -> DemoResult:
    """Run the demo's sections and print each when it is done."""
    from encoder_fast.cli.demo_run import DemoResult

    start = time.perf_counter()
    place = running.place()
    _show_place(place, console)
    with console.status("comparing with float64"):
        parity = running.parity()
    _show_parity(parity, console)
    batches = []
    heading(console, "Speed")
    with console.status("measuring"):
        for batch in running.throughput():
            show_batch(batch, console)
            batches.append(batch)
    show_method(batches[0].baseline, console)
    answers = running.search()
    _show_answers(answers, console)
    console.print(f"[dim]Done in {time.perf_counter() - start:.0f} s.[/]")
    return DemoResult(place, parity, tuple(batches), answers)


def _show_place(place: Place, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    heading(console, "Where it runs")
    versions = ", ".join(f"{name} {number}" for name, number in place.info.versions.items())
    grid = Table.grid(padding=(0, 2))
    grid.add_row("model", escape(place.model))
    grid.add_row("processor", escape(place.processor))
    if place.device == "cpu":
        grid.add_row("", place.info.cpu)
    grid.add_row("backend", f"[bold]{place.backend}[/] ({place.why})")
    grid.add_row("versions", versions)
    console.print(grid)
    for line in place.missing:
        console.print(f"[yellow]{line}[/]")


def _show_parity(reports: tuple[ParityReport, ...], console: Console) -> None:
    heading(console, "Same numbers")
    console.print(
        "How far the last hidden state is from that of the same model in float64, at the worst "
        "token. The ratio is the patched model's error in units of the original's own; allowed "
        "are 2 and one rounding step. The last figure is the worst ratio of all outputs, each "
        "layer's included."
    )
    rows = table("Dtype", "original", "patched", "ratio", "worst", "Verdict")
    for report in reports:
        last = next(row for row in report.rows if row.name == "last_hidden_state")
        rows.add_row(
            str(report.dtype).removeprefix("torch."),
            f"{last.original_error:.1e}",
            f"{last.error:.1e}",
            f"{last.ratio:.2f}",
            f"{report.worst_ratio:.2f}",
            _verdict(report),
        )
    console.print(rows)


def _verdict(report: ParityReport) -> str:
    if not report.ok:
        return "[red]BROKEN[/]"
    if report.worst_ratio <= 1.1:
        return "[green]as exact as the original[/]"
    return "[green]within the rule[/]"


def _show_answers(answers: tuple[Answer, ...], console: Console) -> None:
    from rich.text import Text

    heading(console, "A semantic search by the patched model")
    for answer in answers:
        console.print(Text(answer.query, style="bold"))
        for i, (score, passage) in enumerate(answer.hits):
            line = Text(f"  {score:.2f}  {passage}", style="dim" if i else "")
            console.print(line, no_wrap=True, overflow="ellipsis")
