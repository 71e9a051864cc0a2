"""From strings to vectors: tokenizer, batching, model and pooling, as a user calls them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import encoder_fast
from bench.contestant import Entry, Ready, Unavailable, need
from bench.machine import Machine
from bench.models import spread_vectors
from bench.roofs import dtype_name
from bench.session import Session
from bench.sources import sources_of_model
from bench.timing import Limits, race_models
from encoder_fast.cli.checkpoint import read_passages
from encoder_fast.cli.demo_run import bundled_model
from encoder_fast.cli.errors import UserError
from encoder_fast.parity import compare

SUITE = "texts"

Encode = Callable[[Sequence[str]], Any]

_CHECKED_TEXTS = 16


@dataclass(frozen=True, slots=True)
class FileCase:
    """A user's own texts, one a line."""

    path: Path
    # Nothing is left out: with these at hand it can be said how fast TextEncoder can be made, and
    # against how good a choice of batches.
    is_thorough = True

    @property
    def kind(self) -> str:
        return self.path.name

    def texts(self) -> list[str]:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.strip()]


@dataclass(frozen=True, slots=True)
class TextCase:
    """Texts made of the demo's passages: ``count`` of them, of ``fewest`` to ``most`` words."""

    kind: str
    count: int
    fewest: int
    most: int
    is_thorough = False

    def texts(self) -> list[str]:
        chance = random.Random(0)
        words = [word for passage in read_passages() for word in passage.split()]
        made = []
        for _ in range(self.count):
            # as many short ones as long ones, by the ratio: few texts are as long as texts may be
            length = round(self.fewest * (self.most / self.fewest) ** chance.random())
            start = chance.randrange(len(words) - length)
            made.append(" ".join(words[start : start + length]))
        return made


def run(session: Session) -> None:
    session.begin(SUITE)
    machine = session.machine
    limits = {
        "cpu": Limits(most=10, fewest=3, seconds=4 if session.quick else 15),
        "gpu": Limits(most=10, fewest=3, seconds=5),
        "fake": Limits(most=1, fewest=1, seconds=1),
    }[machine.kind]
    try:
        source = Source.tiny() if machine.is_fake else Source.minilm(machine, session.minilm)
    except UserError as error:
        session.console.print(f"skipped: {error}")
        return
    cases: Iterable[TextCase | FileCase] = grid(machine, session.quick)
    if session.own_texts is not None:
        cases = [FileCase(session.own_texts)]
    for case in cases:
        texts = case.texts()
        name = f"{source.name} {case.kind} x{len(texts)}"
        if session.turn(SUITE, name, {"kind": case.kind}):
            with torch.inference_mode():
                hold(session, source, case, texts, name, limits)


def grid(machine: Machine, quick: bool) -> Iterator[TextCase]:
    count = {"cpu": 64 if quick else 192, "gpu": 4096, "fake": 3}[machine.kind]
    yield TextCase("queries", count, 4, 16)
    yield TextCase("passages", count // 2 if machine.kind == "cpu" else count, 16, 180)


@dataclass(frozen=True)
class Source:
    """A model and its tokenizer; each call of ``load`` gives a model of its own."""

    name: str
    load: Callable[[str], Any]
    tokenizer: Any
    path: str | None

    @classmethod
    def minilm(cls, machine: Machine, folder: Path | None = None) -> Source:
        """The real all-MiniLM-L6-v2, in the dtype that people run here."""
        path = str(folder or bundled_model())
        dtype = machine.dtypes[0]

        def load(attention: str) -> Any:
            model = transformers.AutoModel.from_pretrained(path, attn_implementation=attention)
            return model.eval().to(machine.device, dtype)

        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        # All cut a text where sentence-transformers does.
        settings = json.loads(Path(path, "sentence_bert_config.json").read_text("utf-8"))
        tokenizer.model_max_length = settings["max_seq_length"]
        return cls("MiniLM-L6", load, tokenizer, path)

    @classmethod
    def tiny(cls) -> Source:
        """A model of one small layer, and a tokenizer that knows the passages' words."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
        words = sorted({word for passage in read_passages() for word in passage.split()})
        vocabulary = {word: i for i, word in enumerate([*special, *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        wrapped = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            unk_token="[UNK]",
            model_max_length=64,
        )
        config = transformers.BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=64,
            num_hidden_layers=1,
            max_position_embeddings=64,
        )

        def load(attention: str) -> Any:
            torch.manual_seed(0)
            model = transformers.AutoModel.from_config(config, attn_implementation=attention)
            spread_vectors(model)
            return model.eval()

        return cls("tiny", load, wrapped, None)


def hold(
    session: Session,
    source: Source,
    case: TextCase | FileCase,
    texts: Sequence[str],
    name: str,
    limits: Limits,
) -> None:
    machine = session.machine
    lengths = [len(ids) for ids in source.tokenizer(texts, truncation=True)["input_ids"]]
    facts = {
        "model": source.name,
        "kind": case.kind,
        "texts": len(texts),
        "tokens": sum(lengths),
        "dtype": str(machine.dtypes[0]).removeprefix("torch."),
    }
    few = texts[:_CHECKED_TEXTS]
    eager = source.load("eager")
    exact = by_hand(eager.double(), source.tokenizer, few)

    def prepare(make: Callable[[], Encode], dtype: torch.dtype) -> Ready:
        encode = make()
        original = by_hand(source.load("eager").to(dtype), source.tokenizer, few)
        found = torch.as_tensor(encode(few)).to(original.device)
        return Ready([lambda: encode(texts)], compare("vectors", found, original, exact))

    entries = [
        Entry(label, lambda make=make, dtype=dtype: prepare(make, dtype), sources)
        for label, make, sources, dtype in _encoders(machine, source, case.is_thorough)
    ]
    session.hold(
        SUITE,
        name,
        facts,
        entries,
        lambda machine, calls, limits: race_models(
            machine, {label: own[0] for label, own in calls.items()}, limits
        ),
        limits,
    )


def by_hand(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The mean over each text's tokens, of length 1, text by text: no padding, no mask."""
    rows = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, return_tensors="pt").to(model.device)
        hidden = model(**inputs).last_hidden_state[0]
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        rows.append(F.normalize(wide.mean(dim=0), dim=0))
    return torch.stack(rows)


def _encoders(
    machine: Machine, source: Source, is_thorough: bool
) -> Iterator[tuple[str, Callable[[], Encode], tuple[str, ...], torch.dtype]]:
    """Label, how to make it, the sources behind it and the dtype that it computes in."""
    backend = machine.default_backend
    ours = (*sources_of_model(backend), "encoder_fast/text/")
    dtype, *others = machine.dtypes
    first_size, *sizes = (256, 64, 1024) if machine.is_gpu else (32, 8, 128)

    def text_encoder(dtype: torch.dtype) -> Encode:
        encoder = encoder_fast.TextEncoder.from_pretrained(
            source.load("sdpa").to(dtype), source.tokenizer, pooling="mean", backend=backend
        )
        return lambda texts: encoder.encode(texts, normalize=True)

    def sentence_transformer(**options: Any) -> Any:
        library = need("sentence_transformers", "sentence-transformers")
        if source.path is None:
            raise Unavailable("has no model in miniature")
        return library.SentenceTransformer(
            source.path, device=str(machine.device), local_files_only=True, **options
        )

    def run_by(model: Any, batch_size: int = first_size) -> Encode:
        return lambda texts: model.encode(
            list(texts), batch_size=batch_size, show_progress_bar=False, normalize_embeddings=True
        )

    def in_dtype(attention: str) -> Any:
        options = {"attn_implementation": attention}
        return sentence_transformer(model_kwargs=options).to(dtype)

    def flash() -> Encode:
        if machine.is_fake:
            raise Unavailable("flash attention needs an NVIDIA GPU")
        need("flash_attn", "flash-attn")
        return run_by(in_dtype("flash_attention_2"))

    def exported(kind: str) -> Encode:
        need("optimum", "optimum, which exports for sentence-transformers,")
        return run_by(sentence_transformer(backend=kind))

    def patched() -> Encode:
        return run_by(encoder_fast.patch(in_dtype("sdpa"), backend=backend))

    yield "TextEncoder", lambda: text_encoder(dtype), ours, dtype
    if is_thorough and others:
        name = dtype_name(others[0])
        yield f"TextEncoder, {name}", lambda: text_encoder(others[0]), ours, others[0]
    yield "sentence-transformers, patched", patched, ours[:-1], dtype
    yield "sentence-transformers", lambda: run_by(in_dtype("sdpa")), (), dtype
    for size in sizes if is_thorough else ():
        label = f"sentence-transformers, batches of {size}"
        yield label, lambda size=size: run_by(in_dtype("sdpa"), size), (), dtype
    if machine.kind == "cpu":
        yield "sentence-transformers, ONNX", lambda: exported("onnx"), (), dtype
        yield "sentence-transformers, OpenVINO", lambda: exported("openvino"), (), dtype
    else:
        yield "sentence-transformers, flash attention", flash, (), dtype
