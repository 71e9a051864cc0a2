"""``encoder-fast parity``: whether a model gives the same numbers once it is patched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from encoder_fast.cli import options
from encoder_fast.cli.errors import UserError, first_line
from encoder_fast.cli.tables import heading, table

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from encoder_fast.cli.checkpoint import Checkpoint
    from encoder_fast.parity import ParityReport

# A head over a whole vocabulary has an output as large as all the rest of the model's together.
_VOCABULARY_HEADS = ("ForMaskedLM", "ForPreTraining", "LMHeadModel")


def parity(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, or a name on the Hugging Face hub.")
    ],
    texts: Annotated[
        str | None,
        typer.Option(
            help="A file with texts to compare on, as for embed.", show_default="built-in passages"
        ),
    ] = None,
    column: options.COLUMN = None,
    count: Annotated[int, typer.Option(min=1, help="How many texts.")] = 12,
    longest: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of the longest text; later ones are cut.",
            show_default="128, with a head over the vocabulary 32",
        ),
    ] = None,
    dtype: Annotated[
        list[options.OneDtype] | None,
        typer.Option(help="Give it again for several.", show_default="those that are fast here"),
    ] = None,
    backend: options.BACKEND = "auto",
    device: options.DEVICE = "auto",
    threads: options.THREADS = None,
) -> None:
    """Compare a patched model with the original, layer by layer, both against float64.

    The model is loaded with the head that it was saved with. An output is right if its error is at
    most twice the original's own and one rounding step. The exit status is 1 where one is not, and
    where the model did not run fast, so that nothing was proved.

    \b
    Examples:
      encoder-fast parity ./my-model
      encoder-fast parity ./my-classifier --texts tickets.csv --column body --count 32
      encoder-fast parity ./my-model --dtype bfloat16 --dtype float32 --longest 512
    """
    from rich.console import Console

    console = Console(highlight=False)
    given = None if texts is None else _read(texts, column, count)
    with console.status("loading"):
        import torch

        import encoder_fast
        from encoder_fast.backends.onednn import has_onednn
        from encoder_fast.cli.checkpoint import Checkpoint, default_device, describe
        from encoder_fast.cli.measuring import mixed_lengths

        if threads is not None:
            torch.set_num_threads(threads)
        where = default_device(encoder_fast.info()) if device == "auto" else device
        checkpoint = Checkpoint(model, "", whole=True, device=where)
        if dtype is None:
            fast = [torch.float32]
            fast += [torch.float16] if where != "cpu" else []
            fast += [torch.bfloat16] if where != "cpu" or has_onednn(torch.bfloat16) else []
        else:
            fast = [getattr(torch, name) for name in dict.fromkeys(dtype)]
        first = checkpoint.load(fast[0], "eager")
        if longest is None:
            longest = 32 if checkpoint.head.endswith(_VOCABULARY_HEADS) else 128
        longest = checkpoint.longest(first, longest)
        lengths = [longest] * len(given) if given else mixed_lengths(count, longest)
        inputs = _shaped(checkpoint, checkpoint.batch(lengths, given or ()))
    tokens = int(inputs["attention_mask"].sum())
    console.print(
        f"{describe(first)}, on {where}; {len(lengths)} texts, {tokens:,} tokens. Errors are "
        "against float64, at the worst token; allowed are 2 times the original's and one rounding "
        "step."
    )
    broken = []
    for kind in fast:
        one = first if kind is fast[0] else checkpoint.load(kind, "eager")
        with console.status(f"comparing in {kind}"):
            try:
                report = encoder_fast.check_parity(one, inputs, backend=backend)
            except (TypeError, ValueError) as error:
                if isinstance(error, encoder_fast.UnsupportedModelError):
                    raise
                raise UserError(f"{model}: {first_line(error)}") from error
        _show(report, console)
        if report.fallbacks:
            (reason, *_) = report.fallbacks
            raise UserError(f"nothing was proved: the original forward ran: {reason}")
        if not report.ok:
            broken.append(str(kind).removeprefix("torch."))
    if broken:
        raise UserError(f"the parity rule is broken in {', '.join(broken)}")


def _read(path: str, column: str | None, count: int) -> list[str]:
    from encoder_fast.cli.records import Source

    found = [record.text for record in islice(Source(path, None, column, None), count)]
    if not found:
        raise UserError(f"{path} has no texts")
    return found


def _shaped(checkpoint: Checkpoint, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if checkpoint.head.endswith("ForMultipleChoice"):
        # one choice of one: (B, 1, S)
        return {name: tensor.unsqueeze(1) for name, tensor in inputs.items()}
    return inputs


def _show(report: ParityReport, console: Console) -> None:
    heading(console, f"{str(report.dtype).removeprefix('torch.')}, backend {report.backend}")
    rows = table("Output", "original", "patched", "ratio", "allowed", "Verdict")
    for name, row in zip(_names(report), report.rows, strict=True):
        rows.add_row(
            name,
            f"{row.original_error:.2e}",
            f"{row.error:.2e}",
            f"{row.ratio:.2f}",
            f"{row.allowed:.2e}",
            "[green]ok[/]" if row.ok else "[red]BROKEN[/]",
        )
    console.print(rows)


def _names(report: ParityReport) -> Iterator[str]:
    """The layers first by what they are; other outputs keep their names."""
    for row in report.rows:
        number = row.name.removeprefix("hidden_states[").removesuffix("]")
        if number == row.name:
            yield row.name
        else:
            yield "embeddings" if number == "0" else f"layer {number}"
