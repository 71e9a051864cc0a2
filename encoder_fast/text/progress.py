"""A progress bar in texts, with the tokens a second beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from time import perf_counter
from types import TracebackType
from typing import Any


class Progress:
    """A context manager around tqdm; does nothing where no bar is wanted."""

    def __init__(self, texts: Iterable[str], shown: bool) -> None:
        self._bar: Any = None
        self._tokens = 0
        self._start = perf_counter()
        if shown:
            from tqdm.auto import tqdm

            total = len(texts) if isinstance(texts, Sized) else None
            self._bar = tqdm(total=total, unit=" texts", unit_scale=False)

    def update(self, texts: int, tokens: int) -> None:
        """Count what a batch has done."""
        if self._bar is None:
            return
        self._tokens += tokens
        rate = self._tokens / max(perf_counter() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(texts)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
