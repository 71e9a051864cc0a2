"""The exception that commands raise on their own account, and how a line reaches the user."""

from __future__ import annotations

import sys
from contextlib import suppress

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


class UselessError(UserError):
    """What ends a run so that none of its results is of use to another."""


def say(message: str) -> None:
    """Print one line on standard error. Where that is closed, nobody is told."""
    if sys.stderr is not None:
        # a name may hold bytes that are not UTF-8
        line = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
        with suppress(OSError):
            print(f"encoder-fast: {line}", file=sys.stderr)


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
