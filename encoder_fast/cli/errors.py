"""The one exception that commands raise on their own account."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user asked for. Its message, one line, is all that they see."""
