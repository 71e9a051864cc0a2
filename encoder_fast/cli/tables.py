"""Headings and tables of figures, as the commands show them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from encoder_fast.cli.measuring import BatchResult


def heading(console: Console, text: str) -> None:
    """A line between sections."""
    console.print()
    console.rule(f"[bold]{text}[/]", align="left", style="dim")


def table(*headers: str) -> Table:
    """A table of figures; a column of text is headed by a name that begins with a capital."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for header in headers:
        justify: Literal["left", "right"] = "left" if header[:1].isupper() else "right"
        made.add_column(header, justify=justify, no_wrap=True)
    return made


def show_batch(batch: BatchResult, console: Console) -> None:
    """What was measured on one batch."""
    shortest, longest = min(batch.lengths), max(batch.lengths)
    tokens = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    rounds = len(batch.timings[0].seconds)
    console.print(
        f"[bold]{batch.name}[/]: {len(batch.lengths)} texts of {tokens} tokens, "
        f"{batch.padding:.0%} padding, median of {rounds} rounds"
    )
    rows = table("Model", "ms", "spread", "real tokens/s", "speed-up")
    for timing in batch.timings:
        rows.add_row(
            timing.label,
            f"{timing.median * 1e3:,.1f}",
            f"{timing.spread:.0%}",
            f"{batch.tokens / timing.median:,.0f}",
            f"{batch.speedup(timing):.2f}x",
            style="bold green" if timing.label.startswith("encoder_fast") else None,
        )
    console.print(rows)


def show_method(baseline: str, console: Console) -> None:
    """How the figures of :func:`show_batch` were taken."""
    console.print(
        "All run in turn, on a CPU each in a process of its own, twice each, and the second call "
        f"counts; 1.00x is {baseline}. The spread, from the 20th to the 80th percentile of the "
        "rounds, says how busy the machine was."
    )
