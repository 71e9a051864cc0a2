"""Figures as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from encoder_fast import TextEncoder
from examples.ticket_routing.learn import Learned, Verdict
from examples.ticket_routing.stream import Measured
from examples.ticket_routing.tickets import Ticket

TAKEN_SHOWN, DECISIONS_SHOWN = 2, 8


def place(
    console: Console,
    figures: Mapping[str, Any],
    known: Sequence[Ticket],
    held_out: Sequence[Ticket],
) -> None:
    """What runs, where, on which tickets."""
    _heading(console, "Where it runs")
    console.print(
        f"{figures['model']} in {figures['dtype']} on {figures['device']}\n"
        f"backend {figures['backend']}; {figures['threads']}\n"
        f"{len(known) + len(held_out)} tickets, {len({t.label for t in known})} departments; "
        f"{len(known)} to learn from, {len(held_out)} held out"
    )


def verdict(console: Console, learned: Learned, found: Verdict, accuracy: float) -> None:
    """How good the head is on held-out tickets."""
    _heading(console, "Held-out tickets")
    console.print(
        f"Accuracy [bold]{found.accuracy:.1%}[/] on {found.tickets} tickets; {found.lenient:.1%} "
        "where a debatable ticket may go to either department. In cross-validation on the others: "
        f"{learned.accuracy:.1%}."
    )
    table = _table("Department", "held out", "right", "Taken for")
    for label, (total, right) in sorted(found.per_label.items(), key=lambda x: x[1][1] / x[1][0]):
        taken = [f"{given} ({n})" for true, given, n in found.confused if true == label]
        table.add_row(label, str(total), f"{right / total:.0%}", ", ".join(taken[:TAKEN_SHOWN]))
    console.print(table)
    console.print(
        f"Sent unseen from a confidence of {learned.sure:.2f} on, chosen so that {accuracy:.0%} of "
        f"them would be right: {found.sent:.0%} of the tickets, of which {found.accuracy_sent:.1%} "
        "are. A person reads the others."
    )
    pairs = found.duplicates
    console.print(
        f"Duplicates from a cosine of {learned.alike:.2f} on: {pairs.flagged} flagged, "
        f"{pairs.right} of them rightly, {pairs.wanted} there are."
    )


def throughput(console: Console, figures: Mapping[str, Any]) -> None:
    """All held-out tickets at once."""
    _heading(console, "Throughput")
    rates = figures["tickets_per_second"]
    slowest = min(rates.values())
    table = _table("System", "ms", "tickets/s", "")
    for name, rate in rates.items():
        milliseconds = median(figures["seconds"][name]) * 1e3
        table.add_row(name, f"{milliseconds:,.0f}", f"{rate:,.0f}", f"{rate / slowest:.2f}x")
    console.print(table)
    console.print(f"All {figures['tickets']} at once, in turn, the median of 3.")


def decisions(console: Console, measured: Measured, held_out: Sequence[Ticket]) -> None:
    """The first few decisions of a live stream, one of each kind at least if there is one."""
    _heading(console, "A live stream")
    first = [d for d in measured.decisions if int(d.id) < len(held_out)]
    shown = first[:DECISIONS_SHOWN]
    for kind in ([d for d in first if d.duplicate_of], [d for d in first if d.needs_human]):
        if kind and kind[0] not in shown:
            shown.append(kind[0])
    table = _table("Ticket", "Goes to", "sure", "Ought to be")
    for decision in shown:
        ticket = held_out[int(decision.id)]
        goes = "a person" if decision.needs_human else decision.department
        if decision.duplicate_of is not None:
            earlier = held_out[int(decision.duplicate_of) % len(held_out)]
            goes += f", as {earlier.id}"
        text = Text(f"{ticket.id} {' '.join(ticket.text.split())}")
        text.truncate(38, overflow="ellipsis")
        table.add_row(text, goes, f"{decision.confidence:.2f}", ticket.label)
    console.print(table)


def latencies(console: Console, points: Mapping[str, Sequence[Measured]], limit: float) -> None:
    """Each rate and system; what missed the limit is marked."""
    table = _table("System", "rate", "answered", "p50 ms", "p95 ms", "p99 ms", "batch", "")
    every = [(one.rate, name, one) for name, of_one in points.items() for one in of_one]
    for rate, name, one in sorted(every, key=lambda item: item[0]):
        found = one.latencies
        p50, p95, p99 = (found.percentile(percent) for percent in (50, 95, 99))
        answered = len(found.seconds)
        table.add_row(
            name,
            f"{rate:g}",
            f"{found.throughput:.1f}",
            *(f"{value * 1e3:.1f}" for value in (p50, p95, p99)),
            f"{answered / max(one.batches, 1):.1f}",
            "" if p99 < limit else "[red]too late[/]",
        )
    console.print(table)
    failed = sum(one.latencies.failed for _, _, one in every)
    if failed:
        console.print(f"[red]{failed} tickets failed.[/]")


def held(console: Console, rates: Mapping[str, float | None], limit: float) -> None:
    """The answer of a sweep."""
    for name, rate in rates.items():
        what = "no rate that was tried" if rate is None else f"{rate:g} tickets a second"
        console.print(f"Held with p99 under {limit * 1e3:g} ms: [bold]{what}[/], {name}")


def cut(console: Console, encoder: TextEncoder) -> None:
    """Say that texts were too long, if any were."""
    count = encoder.report().cut
    if count:
        console.print(f"{count} times a text was cut to {encoder.max_length} tokens.")


def _heading(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}[/]", align="left", style="dim")


def _table(*headers: str) -> Table:
    """A table of figures; a column of text is headed by a name that begins with a capital."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for header in headers:
        justify: Literal["left", "right"] = "left" if header[:1].isupper() else "right"
        table.add_column(header, justify=justify, no_wrap=True)
    return table
