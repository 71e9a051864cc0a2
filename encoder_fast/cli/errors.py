"""The one exception that commands raise on their own account."""

from __future__ import annotations

INTERRUPTED = 130
"""The exit status of a command that Ctrl-C ended, as a shell reports it."""


class UserError(Exception):
    """What the user asked for can't be done. Its message, one line, is all that they see.

    Attributes:
        status: the command's exit status.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
