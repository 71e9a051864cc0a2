"""Tickets: the sample that comes along, or a csv of the user's; and the split into two parts."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.ticket_routing.errors import TicketError

SAMPLE = Path(__file__).parent / "synthetic_tickets.jsonl"

FOLDS = 5
"""One part in ``FOLDS`` is held out."""

FEWEST = 2 * FOLDS
"""A label with fewer tickets can't be learned, held out and chosen by."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """One message of a customer.

    Attributes:
        id: unique among all.
        text: what the customer wrote.
        label: the department that it belongs to.
        also: a second department that one could argue for, or ``None``.
        group: shared by tickets of several customers about one and the same incident, or ``None``.
    """

    id: str
    text: str
    label: str
    also: str | None = None
    group: str | None = None


def read_sample() -> list[Ticket]:
    """The tickets that were written for this example."""
    with SAMPLE.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Ticket(**{name: row[name] for name in Ticket.__slots__}) for row in rows]


def read_csv(path: Path, text_column: str = "text", label_column: str = "label") -> list[Ticket]:
    """The tickets of a csv with a header; columns other than the two are left alone.

    Raises:
        TicketError: no such file, no such column, a broken row, too few labels or tickets.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            tickets = _read_rows(file, path, text_column, label_column)
    except OSError as error:
        raise TicketError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TicketError(f"{path}: not UTF-8 at byte {error.start}") from None
    check(tickets, str(path))
    return tickets


def _read_rows(file, path: Path, text_column: str, label_column: str) -> list[Ticket]:
    reader = csv.DictReader(file, strict=True)
    tickets = []
    try:
        columns = reader.fieldnames or []
        for column in (text_column, label_column):
            if column not in columns:
                raise TicketError(f"{path}: no column {column!r}, only {', '.join(columns)}")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise TicketError(f"{where}: not as many fields as the header's {len(columns)}")
            text, label = row[text_column].strip(), row[label_column].strip()
            if not text or not label:
                raise TicketError(f"{where}: the {'label' if text else 'text'} is empty")
            tickets.append(Ticket(f"line {reader.line_num}", text, label))
    except csv.Error as error:
        raise TicketError(f"{path}, after line {reader.line_num}: {error}") from None
    return tickets


def check(tickets: Sequence[Ticket], name: str) -> None:
    """Raise ``TicketError`` unless these can be learned from."""
    counts = Counter(ticket.label for ticket in tickets)
    if len(counts) < 2:
        raise TicketError(f"{name}: there must be two labels at least, got {', '.join(counts)!r}")
    label, count = min(counts.items(), key=lambda item: item[1])
    if count < FEWEST:
        raise TicketError(f"{name}: label {label!r} has {count} tickets, {FEWEST} are needed")


def split(tickets: Sequence[Ticket], seed: int) -> tuple[list[Ticket], list[Ticket]]:
    """Those to learn from and those held out, each label in both in proportion.

    Tickets of one group, and equal texts, stay together: a held-out ticket whose twin was learned
    would be no test.
    """
    held_out = fold_of_each(tickets, seed) == 0
    learned = [ticket for ticket, out in zip(tickets, held_out, strict=True) if not out]
    return learned, [ticket for ticket, out in zip(tickets, held_out, strict=True) if out]


def fold_of_each(tickets: Sequence[Ticket], seed: int):
    """Which of ``FOLDS`` parts each ticket is in, int ``(N,)``: stratified by label, by group."""
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold

    labels = [ticket.label for ticket in tickets]
    groups = [ticket.group or ticket.text for ticket in tickets]
    folds = np.empty(len(tickets), dtype=int)
    parts = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (_, members) in enumerate(parts.split(labels, labels, groups)):
        folds[members] = number
    return folds
