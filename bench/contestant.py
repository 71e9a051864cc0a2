"""What runs in a race, and how one says that it can't."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from bench.timing import Call
from encoder_fast.parity import ParityRow


class Unavailable(Exception):
    """A contestant that can't run here; its message is the reason that the record gives."""


def need(module: str, package: str | None = None) -> ModuleType:
    """Import a peer's module, or say that it is not there."""
    package = package or module.partition(".")[0]
    try:
        if importlib.util.find_spec(module) is None:
            raise Unavailable(f"{package} is not installed")
        return importlib.import_module(module)
    except ImportError as error:
        # a broken or half-installed package is as good as none, but the reader should know
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            raise Unavailable(f"{package} is not installed") from None
        raise Unavailable(f"{package} can't be imported: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


@dataclass(frozen=True, slots=True)
class Ready:
    """A contestant that is built, has run once and can be timed.

    Attributes:
        calls: the same work on different inputs.
        parity: how its result compares with float64.
        memory_bytes: what building it and running it once added at the peak, where that is known.
    """

    calls: Sequence[Call]
    parity: ParityRow
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A contestant that is still to be built, by ``prepare``.

    Attributes:
        sources: prefixes of our files that decide its figures; a peer has none.
        compiles: building it takes long, so that it is left out when time runs short.
    """

    label: str
    prepare: Callable[[], Ready]
    sources: tuple[str, ...] = ()
    compiles: bool = False

    @property
    def ours(self) -> bool:
        return bool(self.sources)
