"""``encoder-fast tag``: the named entities of each text of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from encoder_fast.cli import options

if TYPE_CHECKING:
    from encoder_fast.cli.parts import Part

FORMATS = ("jsonl", "csv", "parquet")
FIELDS = ("label", "text", "start", "stop", "probability")


def tag(
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
    aggregation_strategy: Annotated[
        Literal["none", "simple", "first", "average", "max"],
        typer.Option(
            help="A word has the label of its first token, of the average, or of the surest one; "
            "simple and none read tokens, put together or one by one."
        ),
    ] = "first",
    long_text: Annotated[
        options.LongText,
        typer.Option(help="Read texts that are too long in windows, cut them, or stop."),
    ] = "chunk",
    device: options.DEVICE = "auto",
    dtype: options.DTYPE = "auto",
    backend: options.BACKEND = "auto",
    threads: options.THREADS = None,
    max_tokens_per_batch: options.MAX_TOKENS = None,
    block_size: options.BLOCK_SIZE = 1024,
    quiet: options.QUIET = False,
) -> None:
    """Find the named entities of each text.

    For a model with a token classification head. "start" and "stop" are characters of the text,
    the second one past the last. jsonl and parquet have a record's entities together, csv has a
    row for each entity.

    \b
    Examples:
      encoder-fast tag letters.txt -m ./my-tagger
      encoder-fast tag news.jsonl --id-column url -m ./my-tagger -o entities.csv
      encoder-fast tag news.txt -m ./my-tagger --aggregation-strategy average -o entities.jsonl
      echo "Ada Lovelace lived in London." | encoder-fast tag - -m ./my-tagger
    """
    from encoder_fast.cli.job import Job, Results
    from encoder_fast.cli.loading import ModelChoice
    from encoder_fast.cli.output import Output
    from encoder_fast.cli.records import Source
    from encoder_fast.cli.writing import write_csv_of, write_jsonl, write_parquet_of
    from encoder_fast.text import TextEncoder

    source = Source(input, input_format, column, id_column)
    target = Output(output, format, FORMATS, overwrite=overwrite, resume=resume)

    def stream(encoder: TextEncoder, texts: Iterable[str], show: bool) -> Iterator[Results]:
        blocks = encoder.tag_stream(
            texts,
            aggregation_strategy=aggregation_strategy,
            long_text=long_text,
            block_size=block_size,
            show_progress=show,
        )
        for block in blocks:
            yield [{"entities": [asdict(entity) for entity in found]} for found in block]

    writers = {
        "jsonl": write_jsonl,
        "csv": write_csv_of(list(FIELDS), _rows),
        "parquet": write_parquet_of(_types),
    }
    Job(
        source=source,
        output=target,
        choice=ModelChoice(model, device, dtype, backend, threads, max_tokens_per_batch),
        stream=stream,
        empty=lambda encoder: [],
        writer=lambda encoder: writers[target.format],
        options={
            "command": "tag",
            "aggregation strategy": aggregation_strategy,
            "long_text": long_text,
            "block size": block_size,
        },
        quiet=quiet,
    ).run()


def _rows(name: str | int, found: dict[str, Any]) -> Iterator[list]:
    for entity in found["entities"]:
        yield [name, *(entity[field] for field in FIELDS)]


def _types(pyarrow: Any, part: Part) -> dict[str, Any]:
    kinds = (
        pyarrow.string(),
        pyarrow.string(),
        pyarrow.int64(),
        pyarrow.int64(),
        pyarrow.float64(),
    )
    return {"entities": pyarrow.list_(pyarrow.struct(list(zip(FIELDS, kinds, strict=True))))}
