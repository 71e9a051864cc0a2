"""What is decided on each ticket: a department, how sure that is, and whether it came before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from examples.ticket_routing.duplicates import Recent
from examples.ticket_routing.encoders import Encoder
from examples.ticket_routing.head import Head


@dataclass(frozen=True, slots=True)
class Message:
    """A ticket as it comes in."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a ticket.

    Attributes:
        id: the ticket's.
        department: the most probable one.
        confidence: its probability.
        needs_human: the confidence is too low to send the ticket there unseen.
        duplicate_of: the id of an earlier ticket about the same thing, or ``None``.
        similarity: the cosine with the most similar ticket in the window.
    """

    id: str
    department: str
    confidence: float
    needs_human: bool
    duplicate_of: str | None
    similarity: float


class Desk:
    """Decides on tickets in the order in which they come.

    Args:
        window: how many of the last tickets a new one is compared with.
        sure: the confidence below which a person has to look.
        alike: the cosine from which on two tickets are duplicates.
    """

    def __init__(
        self, encoder: Encoder, head: Head, *, window: int, sure: float, alike: float
    ) -> None:
        self.encoder = encoder
        self._head = head
        self._recent = Recent(window, head.weight.shape[1])
        self._sure = sure
        self._alike = alike

    def decide(self, messages: Sequence[Message]) -> list[Decision]:
        """One batch. When the encoder raises, nothing has been remembered."""
        vectors = self.encoder.encode([message.text for message in messages])
        probabilities = self._head.probabilities(vectors)
        decisions = []
        for message, vector, row in zip(messages, vectors, probabilities, strict=True):
            best = int(row.argmax())
            confidence = float(row[best])
            earlier, similarity = self._recent.nearest(vector)
            self._recent.add(message.id, vector)
            decisions.append(
                Decision(
                    id=message.id,
                    department=self._head.labels[best],
                    confidence=confidence,
                    needs_human=confidence < self._sure,
                    duplicate_of=earlier if similarity >= self._alike else None,
                    similarity=similarity,
                )
            )
        return decisions
