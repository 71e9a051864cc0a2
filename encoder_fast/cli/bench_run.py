"""What ``encoder-fast bench`` measures, as plain data."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterator, Sequence

import torch

import encoder_fast
from encoder_fast.backends.onednn import has_onednn
from encoder_fast.cli.checkpoint import Checkpoint, describe, processor
from encoder_fast.cli.errors import UserError
from encoder_fast.cli.measuring import (
    DTYPE_NAMES,
    BatchResult,
    Contestant,
    mixed_lengths,
)
from encoder_fast.cli.race import Rounds, race, ready
from encoder_fast.cli.record import commit


class Bench:
    """One model, run in every way.

    Args:
        lengths: tokens of the longest text of each batch; a model with fewer positions cuts them.
        texts: rows of each batch.
        with_compile: run ``torch.compile`` too.

    Raises:
        UserError: the model can't be loaded.
        UnsupportedModelError: it has no fast path.
    """

    def __init__(
        self,
        path: str,
        *,
        device: str,
        dtypes: Sequence[torch.dtype],
        lengths: Sequence[int],
        texts: int,
        rounds: Rounds,
        with_compile: bool,
    ) -> None:
        self.info = encoder_fast.info()
        self.device = device
        self._rounds = rounds
        self._checkpoint = Checkpoint(path, "", device=device)
        self._attention = self._find_attention(dtypes[0])
        model = self._checkpoint.load(dtypes[0], self._attention)
        self.model = describe(model)
        self._patched = encoder_fast.patch(model, strict=True)
        self.lengths = sorted({self._checkpoint.longest(model, length) for length in lengths})
        self.texts = texts
        self._dtypes = dtypes
        self._compiles = with_compile

    @property
    def place(self) -> str:
        entry = encoder_fast.report(self._patched).encoders[0]
        return f"{processor(self.device, self.info)}; backend {entry.backend} ({entry.why})"

    def check(self) -> None:
        """Hold the model to the parity rule: the speed of wrong numbers is none.

        Raises:
            UserError: it breaks the rule.
        """
        inputs = self._checkpoint.batch(mixed_lengths(8, min(64, self.lengths[-1])))
        for dtype in self._dtypes:
            report = encoder_fast.check_parity(self._checkpoint.load(dtype, "eager"), inputs)
            if not report.ok:
                name = str(dtype).removeprefix("torch.")
                raise UserError(f"the parity rule is broken in {name}; see encoder-fast parity")

    def run(self) -> Iterator[BatchResult]:
        """Every contestant on texts of mixed lengths and on full ones, for each length."""
        contestants = list(self._contestants())
        baseline = next(c.label for c in contestants if c.attention == self._attention)
        with ready(self._checkpoint, contestants) as runners:
            for longest in self.lengths:
                mixed = mixed_lengths(self.texts, longest)
                random.Random(0).shuffle(mixed)
                batches = {f"mixed {longest}": mixed, f"full {longest}": [longest] * self.texts}
                for name, lengths in batches.items():
                    timings = race(runners, self._checkpoint.batch(lengths), self._rounds)
                    yield BatchResult(name, tuple(lengths), tuple(timings), baseline)

    def _contestants(self) -> Iterator[Contestant]:
        for dtype in self._dtypes:
            name, best = DTYPE_NAMES[dtype], self._attention
            yield Contestant(f"Hugging Face eager {name}", dtype, "eager")
            if best == "sdpa":
                yield Contestant(f"Hugging Face SDPA {name}", dtype, best)
            if self._compiles:
                yield Contestant(f"torch.compile {name}", dtype, best, is_compiled=True)
            yield Contestant(f"encoder_fast {name}", dtype, best, is_patched=True)

    def _find_attention(self, dtype: torch.dtype) -> str:
        """``sdpa``, but for architectures that have eager attention alone."""
        try:
            self._checkpoint.load(dtype, "sdpa")
        except UserError as error:
            if isinstance(error.__cause__, ValueError) and "attention" in str(error.__cause__):
                return "eager"
            raise
        return "sdpa"


def default_dtypes(device: str) -> list[torch.dtype]:
    """On a GPU float16; on a CPU float32, and bfloat16 where the processor has it."""
    if device != "cpu":
        return [torch.float16]
    return [torch.float32, *([torch.bfloat16] if has_onednn(torch.bfloat16) else [])]


def as_csv(bench: Bench, results: Sequence[BatchResult]) -> str:
    """A row for each contestant on each batch."""
    text = io.StringIO()
    same = {
        "model": bench.model,
        "processor": processor(bench.device, bench.info),
        "threads": torch.get_num_threads(),
        **bench.info.versions,
        "commit": commit(),
    }
    columns = "batch texts longest real_tokens padding contestant rounds median_ms p20_ms p80_ms"
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*columns.split(), "real_tokens_per_s", "speedup", *same])
    for result in results:
        shape = [len(result.lengths), max(result.lengths), result.tokens, f"{result.padding:.3f}"]
        for timing in result.timings:
            times = (timing.median, timing.percentile(0.2), timing.percentile(0.8))
            table.writerow(
                [
                    *(result.name, *shape, timing.label, len(timing.seconds)),
                    *(f"{seconds * 1e3:.3f}" for seconds in times),
                    f"{result.tokens / timing.median:.1f}",
                    f"{result.speedup(timing):.3f}",
                    *same.values(),
                ]
            )
    return text.getvalue()
