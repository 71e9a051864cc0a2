"""``encoder-fast classify``: a label for each text of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from encoder_fast.cli import options

if TYPE_CHECKING:
    from encoder_fast.cli.parts import Part

FORMATS = ("jsonl", "csv", "parquet")


def classify(
    input: options.INPUT,
    model: options.MODEL,
    output: Annotated[str, typer.Option("--output", "-o", help=options.OUTPUT_HELP)] = "-",
    format: Annotated[
        Literal["jsonl", "csv", "parquet"] | None,
        typer.Option(help="What the output is.", show_default="by its name; jsonl for -"),
    ] = None,
    input_format: options.INPUT_FORMAT = None,
    column: options.COLUMN = None,
    id_column: options.ID_COLUMN = None,
    resume: options.RESUME = False,
    overwrite: options.OVERWRITE = False,
    long_text: Annotated[
        options.LongText,
        typer.Option(help="Cut texts that are too long, average their windows, or stop."),
    ] = "truncate",
    device: options.DEVICE = "auto",
    dtype: options.DTYPE = "auto",
    backend: options.BACKEND = "auto",
    threads: options.THREADS = None,
    max_tokens_per_batch: options.MAX_TOKENS = None,
    block_size: options.BLOCK_SIZE = 1024,
    quiet: options.QUIET = False,
) -> None:
    """Label each text, with every label's probability.

    For a model with a sequence classification head. Where its labels do not exclude each other,
    jsonl and parquet list as "labels" all with a probability of one half or more.

    \b
    Examples:
      encoder-fast classify reviews.txt -m ./my-classifier
      encoder-fast classify tickets.csv --column body --id-column id -m ./my-classifier -o out.csv
      echo "What a lovely day." | encoder-fast classify - -m ./my-classifier
    """
    from encoder_fast.cli.job import Job, Results
    from encoder_fast.cli.loading import ModelChoice
    from encoder_fast.cli.output import Output
    from encoder_fast.cli.records import Source
    from encoder_fast.cli.writing import Writer, write_csv_of, write_jsonl, write_parquet_of
    from encoder_fast.text import TextEncoder
    from encoder_fast.text.classify import label_names

    source = Source(input, input_format, column, id_column)
    target = Output(output, format, FORMATS, overwrite=overwrite, resume=resume)

    def stream(encoder: TextEncoder, texts: Iterable[str], show: bool) -> Iterator[Results]:
        blocks = encoder.classify_stream(
            texts, long_text=long_text, block_size=block_size, show_progress=show
        )
        for block in blocks:
            yield [{**asdict(found), "labels": list(found.labels)} for found in block]

    def writer(encoder: TextEncoder) -> Writer:
        if target.format == "jsonl":
            return write_jsonl
        names = label_names(encoder.model.config)
        if target.format == "csv":
            columns = ["label", "probability", *(f"p({name})" for name in names)]
            return write_csv_of(columns, _rows)
        return write_parquet_of(lambda pyarrow, part: _types(pyarrow, part, names))

    Job(
        source=source,
        output=target,
        choice=ModelChoice(model, device, dtype, backend, threads, max_tokens_per_batch),
        stream=stream,
        empty=lambda encoder: [],
        writer=writer,
        options={"command": "classify", "long_text": long_text, "block size": block_size},
        quiet=quiet,
    ).run()


def _rows(name: str | int, found: dict[str, Any]) -> Iterator[list]:
    yield [name, found["label"], found["probability"], *found["probabilities"].values()]


def _types(pyarrow: Any, part: Part, names: list[str]) -> dict[str, Any]:
    return {
        "label": pyarrow.string(),
        "probability": pyarrow.float64(),
        "labels": pyarrow.list_(pyarrow.string()),
        "probabilities": pyarrow.struct({name: pyarrow.float64() for name in names}),
    }
