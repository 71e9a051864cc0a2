"""``docs/parity.md``: how near to float64 each family is, and what that means for results."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import encoder_fast
from bench import real
from bench.contestant import Unavailable, first_line
from bench.machine import Machine, versions
from bench.models import SIZES, ModelCase, Size, build, inputs_of
from bench.record import command_line, commit_of
from bench.report.tables import table
from bench.roofs import dtype_name
from bench.sources import ROOT
from bench.workloads import Workload
from encoder_fast.cli.demo_run import bundled_model
from encoder_fast.cli.errors import UserError
from encoder_fast.errors import UnsupportedModelError
from encoder_fast.parity import ParityReport

# A width at which a CPU runs more than one layer of it.
_NARROW_XL = Size(
    "XLM-RoBERTa-XL, 1024 wide",
    "XLMRobertaXLConfig",
    {
        **SIZES["XLM-RoBERTa-XL"].settings,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    layers=3,
    cpu_layers=3,
)

# Few enough words that a float64 copy of every model is small.
_VOCABULARY = 8000

_INTRODUCTION = """\
# Parity

<!-- Made by `python -m bench parity`. Do not edit. -->

The rule, in any dtype and on the real tokens alone: the error of a patched model against the same
model in float64 is at most twice that of the original eager model, plus one rounding step
([why so](../CONTRIBUTING.md#the-parity-rule)). A ratio of 1 is as exact as the original; below 1 is
nearer to float64 than the original is.

An output of one or two numbers a text is another matter: now and then the original's error is
small by luck, and twice of it is nothing. So an output of fewer than 1,024 numbers that seems
broken is judged over 8 further inputs, the same call over random tokens, and if it still seems
broken, over 64. Over all of them together, the root mean square of the error must keep to the
rule. And the error in the first input may not be above twice the worst that the original has in
any, so that a fault in one text is not lost among the others. A real fault is as large in every
input; luck is not. Of 1,372 tiny random models of all families, mostly with one to three labels,
over one to three texts in float32, the plain rule called 88 broken (6.4%, 95% interval 5.2 to
7.8); with further inputs none was (0 to 0.27%). A scale 0.1% off, a dropped bias, a wrong token
and a wrong epsilon still show in a single logit.
"""


@dataclass(frozen=True, slots=True)
class FamilyResult:
    """What the rule says of one architecture in one dtype; ``reason`` where it could not run, and
    ``failed`` where it should have."""

    title: str
    dtype: str
    report: ParityReport | None
    reason: str = ""
    failed: bool = False


def write_page(machine: Machine, path: Path, *, quick: bool = False) -> bool:
    """Measure, write the page, and say whether the rule held everywhere."""
    families = list(family_results(machine, quick))
    parts = [_INTRODUCTION, *_families(families)]
    for title, section in _SECTIONS:
        try:
            with torch.inference_mode():
                body = section(machine, quick)
        except (Unavailable, UserError) as error:
            body = f"Not measured: {error}."
        parts.append(f"## {title}\n\n{body}\n")
    packages = ", ".join(f"{k} {versions()[k]}" for k in ("torch", "triton", "transformers"))
    parts.append(
        f"Made by `{command_line()}` at commit `{commit_of(ROOT)}` on {machine.name}, backend "
        f"{machine.default_backend}, {datetime.now(UTC):%Y-%m-%d}; {packages}.\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), "utf-8")
    return all(
        not result.failed if result.report is None else result.report.ok for result in families
    )


def family_results(machine: Machine, quick: bool) -> Iterator[FamilyResult]:
    sizes = [*SIZES.values(), _NARROW_XL]
    for size in sizes[:1] if quick else sizes:
        if size.config_class != "ModernBertConfig":
            size = replace(size, settings={**size.settings, "vocab_size": _VOCABULARY})
        for dtype in machine.dtypes:
            case = ModelCase(size, Workload("half", 6, 64), dtype)
            title = case.title(machine)
            try:
                model = build(case, machine, "sdpa" if size.sdpa else None)
                report = encoder_fast.check_parity(
                    model, inputs_of(case, machine), backend=machine.default_backend
                )
            except (Unavailable, UnsupportedModelError) as error:
                reason = str(error).partition(". ")[0]
                yield FamilyResult(title, dtype_name(dtype), None, reason)
            except Exception as error:
                reason = first_line(error)
                yield FamilyResult(title, dtype_name(dtype), None, reason, failed=True)
            else:
                yield FamilyResult(title, dtype_name(dtype), report)


def _families(results: Sequence[FamilyResult]) -> Iterator[str]:
    yield (
        "## Families\n\nSeeded random weights in the published widths, 6 texts of 2 to 64 tokens. "
        "The error is the root mean square over a token's features, of the worst token of the last "
        "hidden state; *worst ratio* is over all outputs, each layer's included.\n"
    )
    rows = []
    for result in results:
        head = [result.title, result.dtype]
        if result.report is None:
            rows.append([*head, "-", "-", "-", "-", result.reason])
            continue
        last = next(row for row in result.report.rows if row.name == "last_hidden_state")
        verdict = "holds" if result.report.ok else "**BROKEN**"
        if result.report.fallbacks:
            verdict = f"not proved: {', '.join(result.report.fallbacks)}"
        errors = [f"{last.original_error:.2e}", f"{last.error:.2e}", f"{last.ratio:.2f}"]
        rows.append([*head, *errors, f"{result.report.worst_ratio:.2f}", verdict])
    headers = ("Model", "Dtype", "original", "ours", "ratio", "worst ratio", "Rule")
    yield table(headers, rows) + "\n"
    for dtype in dict.fromkeys(result.dtype for result in results):
        yield _by_layer([r for r in results if r.dtype == dtype and r.report], dtype)


def _by_layer(results: Sequence[FamilyResult], dtype: str) -> str:
    """The ratio after each layer; what is left in the models with fewer of them stays empty."""
    lines = []
    for result in results:
        assert result.report is not None
        ratios = [r.ratio for r in result.report.rows if r.name.startswith("hidden_states[")]
        lines.append([result.title, *(f"{ratio:.2f}" for ratio in ratios)])
    depth = max((len(line) for line in lines), default=1)
    headers = ["Model", "embeddings", *(f"{i}" for i in range(1, depth - 1))]
    body = table(headers, [line + [""] * (depth - len(line)) for line in lines])
    return (
        f"<details><summary>Error by layer in {dtype}, in units of the original's</summary>\n\n"
        f"{body}\n\n</details>\n"
    )


def labels(machine: Machine, quick: bool) -> str:
    """How many texts a real classifier labels as it does in float64."""
    model, vocabulary = real.reaction_classifier()
    texts = real.reactions()[: 16 if quick else None]
    inputs = {
        name: value.to(machine.device)
        for name, value in real.tokenise_reactions(texts, vocabulary).items()
    }
    rows = []
    for dtype in machine.dtypes:
        original, ours, exact = _three(model, machine, dtype)
        wanted = exact(**inputs).logits.argmax(dim=-1)
        found = [m(**inputs).logits.argmax(dim=-1) == wanted for m in (original, ours)]
        counts = [f"{int(same.sum())} of {len(texts)}" for same in found]
        rows.append([dtype_name(dtype), *counts])
    kinds = len(wanted.unique())
    return (
        "The real rxnfp classifier, 50 kinds of chemical reactions, on "
        f"{len(texts)} reactions of which float64 makes {kinds} kinds: how many get the label that "
        f"float64 gives.\n\n{table(('Dtype', 'original', 'ours'), rows)}"
    )


def retrieval(machine: Machine, quick: bool) -> str:
    """How much of a search by a real model comes out as it does in float64."""
    path = str(bundled_model())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    base = transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    what, queries, documents = real.documents()
    if quick:
        queries, documents = queries[:3], documents[:12]
    rows = []
    for dtype in machine.dtypes:
        tops = []
        for model in _three(base, machine, dtype):
            vectors = [embed(model, tokenizer, texts) for texts in (queries, documents)]
            tops.append((vectors[0] @ vectors[1].T).topk(10, dim=1).indices)
        *compared, exact = tops
        rows.append([dtype_name(dtype), *(f"{_overlap(top, exact):.1%}" for top in compared)])
    return (
        f"The real all-MiniLM-L6-v2 on {what}: of the ten documents nearest to each of "
        f"{len(queries)} queries among {len(documents)}, the share that float64 finds too.\n\n"
        f"{table(('Dtype', 'original', 'ours'), rows)}"
    )


def invariance(machine: Machine, quick: bool) -> str:
    """How much a text's vector changes with the texts that share its batch."""
    path = str(bundled_model())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    base = transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    _, _, documents = real.documents()
    chance = random.Random(0)
    subjects = documents[:: len(documents) // 4][: 2 if quick else 4]
    rows = []
    for dtype in machine.dtypes:
        original, ours, _ = _three(base, machine, dtype)
        batches = []
        for subject, mates in product(subjects, (3,) if quick else (1, 3, 7, 15)):
            batch = chance.sample(documents, mates)
            place = chance.randrange(mates + 1)
            batches.append((subject, place, [*batch[:place], subject, *batch[place:]]))
        changes = []
        for model in (original, ours):
            alone = {text: embed(model, tokenizer, [text])[0] for text in subjects}
            gaps = [
                (embed(model, tokenizer, batch)[place] - alone[subject]).abs().max().item()
                for subject, place, batch in batches
            ]
            changes.append(f"{max(gaps):.1e}")
        step = torch.finfo(dtype).eps * 0.25
        rows.append([dtype_name(dtype), *changes, f"{step:.1e}"])
    return (
        "How much a text's vector changes with the texts that share its batch: the largest change "
        "of any of its 384 values over 1 to 15 other texts, against the same text alone "
        "(all-MiniLM-L6-v2, vectors of length 1). The last column is one rounding step of the "
        "dtype at 0.25, where the largest values lie.\n\n"
        f"{table(('Dtype', 'original', 'ours', 'one step'), rows)}"
    )


def embed(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 16) -> Tensor:
    """``(N, D)`` of length 1: the mean over each text's tokens, in padded batches."""
    rows = []
    for start in range(0, len(texts), batch):
        part = list(texts[start : start + batch])
        inputs = tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt")
        inputs = inputs.to(model.device)
        hidden = model(**inputs).last_hidden_state
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        mask = inputs["attention_mask"].unsqueeze(-1)
        rows.append(F.normalize((wide * mask).sum(dim=1) / mask.sum(dim=1), dim=-1))
    return torch.cat(rows)


def _three(model: Any, machine: Machine, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """The original and ours in ``dtype``, and the same weights in float64."""
    original = copy.deepcopy(model).to(machine.device, dtype)
    ours = encoder_fast.patch(copy.deepcopy(original), backend=machine.default_backend, strict=True)
    return original, ours, copy.deepcopy(original).double()


def _overlap(found: Tensor, exact: Tensor) -> float:
    pairs = zip(found.tolist(), exact.tolist(), strict=True)
    shared = [len(set(mine) & set(theirs)) for mine, theirs in pairs]
    return sum(shared) / exact.numel()


_SECTIONS: tuple[tuple[str, Callable[[Machine, bool], str]], ...] = (
    ("Labels", labels),
    ("Retrieval", retrieval),
    ("Batch-mates", invariance),
)
