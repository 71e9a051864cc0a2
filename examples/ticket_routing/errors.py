"""The one exception that the example raises on its own account."""

from __future__ import annotations


class TicketError(Exception):
    """A mistake in what the user gave. Its message, one line, is all that they see."""
