"""From tickets with labels to a desk that is set up, and to how good it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from examples.ticket_routing.duplicates import Matches, choose_threshold, matches
from examples.ticket_routing.head import Head, confidence_for, out_of_fold, train
from examples.ticket_routing.tickets import Ticket, fold_of_each


@dataclass(frozen=True, slots=True)
class Learned:
    """What was learned from the tickets that were not held out.

    Attributes:
        head: the classifier.
        sure: the confidence from which on a ticket goes to its department unseen.
        alike: the cosine from which on two tickets are duplicates.
        accuracy: how often the head is right on folds that were held out from it in turn.
    """

    head: Head
    sure: float
    alike: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the head says of held-out tickets.

    Attributes:
        tickets: how many there are.
        accuracy: the share that it gets right.
        lenient: the share with the second department of debatable tickets counted as right too.
        per_label: of each label how many there are, and how many are right.
        confused: true label, given label and how often, the most frequent first.
        sent: the share that is sure enough to go unseen.
        accuracy_sent: the share of these that is right.
        duplicates: what the duplicate detection finds among them.
    """

    tickets: int
    accuracy: float
    lenient: float
    per_label: dict[str, tuple[int, int]]
    confused: list[tuple[str, str, int]]
    sent: float
    accuracy_sent: float
    duplicates: Matches


def learn(tickets: Sequence[Ticket], vectors: np.ndarray, *, accuracy: float, seed: int) -> Learned:
    """Train the head, and choose both thresholds on what is held out from it in turn.

    Args:
        accuracy: how often the tickets that are sent unseen shall be right.
    """
    labels = [ticket.label for ticket in tickets]
    probabilities = out_of_fold(vectors, labels, fold_of_each(tickets, seed))
    names = np.array(sorted(set(labels)))
    right = names[probabilities.argmax(axis=1)] == labels
    return Learned(
        head=train(vectors, labels),
        sure=confidence_for(right, probabilities.max(axis=1), accuracy),
        alike=choose_threshold(vectors, [ticket.group for ticket in tickets]),
        accuracy=float(right.mean()),
    )


def judge(learned: Learned, tickets: Sequence[Ticket], vectors: np.ndarray) -> Verdict:
    """Compare with the labels of tickets that nothing was learned from."""
    probabilities = learned.head.probabilities(vectors)
    given = [learned.head.labels[best] for best in probabilities.argmax(axis=1)]
    right = np.array([ticket.label == label for ticket, label in zip(tickets, given, strict=True)])
    second = np.array([ticket.also == label for ticket, label in zip(tickets, given, strict=True)])
    sent = probabilities.max(axis=1) >= learned.sure
    total = Counter(ticket.label for ticket in tickets)
    hits = Counter(ticket.label for ticket, hit in zip(tickets, right, strict=True) if hit)
    confused = Counter(
        (ticket.label, label)
        for ticket, label in zip(tickets, given, strict=True)
        if ticket.label != label
    )
    return Verdict(
        tickets=len(tickets),
        accuracy=float(right.mean()),
        lenient=float((right | second).mean()),
        per_label={label: (total[label], hits[label]) for label in sorted(total)},
        confused=[(*pair, count) for pair, count in confused.most_common()],
        sent=float(sent.mean()),
        accuracy_sent=float(right[sent].mean()) if sent.any() else float("nan"),
        duplicates=matches(vectors, [ticket.group for ticket in tickets], learned.alike),
    )
