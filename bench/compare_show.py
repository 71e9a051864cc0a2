"""A comparison of two records as tables on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.compare import FASTER, SAME, SLOWER, Comparison

_STYLES = {FASTER: "green", SLOWER: "red", SAME: "dim"}


def show(found: Comparison, console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    for warning in found.warnings:
        console.print(f"note: {warning}", style="yellow")
    drift = found.drift
    if drift.peers < 3:
        console.print("Fewer than three peers ran in both: how the machine drifted is not known.")
    else:
        console.print(
            f"{drift.peers} peers took {drift.factor:.2f} times as long in B as in A and scatter "
            f"by {drift.scatter:.0%}; that drift is taken out of every change."
        )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for header in ("Case", "Contestant"):
        table.add_column(header, overflow="fold")
    for header in ("A ms", "B ms", "time", "noise"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("Verdict", no_wrap=True)
    for verdict in sorted(found.verdicts, key=lambda verdict: verdict.change):
        _, case, contestant = verdict.key
        style = _STYLES[verdict.word]
        table.add_row(
            escape(case),
            contestant,
            f"{verdict.before * 1e3:.4g}",
            f"{verdict.after * 1e3:.4g}",
            f"{verdict.change - 1:+.0%}",
            f"±{verdict.noise:.0%}",
            f"[{style}]{verdict.word}[/]",
        )
    console.print(table)
    for title, lines in (("no longer in B", found.lost), ("new in B", found.gained)):
        for line in lines:
            console.print(escape(f"{title}: {line}"), soft_wrap=True)
    words = [verdict.word for verdict in found.verdicts]
    counts = ", ".join(f"{words.count(word)} {word}" for word in (FASTER, SLOWER, SAME))
    console.print(f"[bold]{counts}[/]")
