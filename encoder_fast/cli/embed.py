"""``encoder-fast embed``: a vector for each text of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from encoder_fast.cli import options
from encoder_fast.cli.errors import UserError

if TYPE_CHECKING:
    from encoder_fast.cli.parts import Part, Unfinished

FORMATS = ("npy", "jsonl", "parquet")


def embed(
    input: options.INPUT,
    model: options.MODEL,
    output: Annotated[
        str, typer.Option("--output", "-o", help=options.OUTPUT_HELP, show_default=False)
    ],
    format: Annotated[
        Literal["npy", "jsonl", "parquet"] | None,
        typer.Option(help="What the output is.", show_default="by its name; jsonl for -"),
    ] = None,
    input_format: options.INPUT_FORMAT = None,
    column: options.COLUMN = None,
    id_column: options.ID_COLUMN = None,
    resume: options.RESUME = False,
    overwrite: options.OVERWRITE = False,
    pooling: Annotated[
        Literal["cls", "mean", "max"] | None,
        typer.Option(help="How tokens become a vector.", show_default="the model's own, or mean"),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize", help="To length 1.", show_default="as the model's files"
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Put before each text: a name among the model's prompts, or a text.",
            show_default="the model's own",
        ),
    ] = None,
    truncate_dim: Annotated[
        int | None, typer.Option(min=1, help="Keep that many values.", show_default="all")
    ] = None,
    precision: Annotated[
        Literal["float32", "int8", "binary"],
        typer.Option(help="int8 scales by the range of all texts; binary keeps signs."),
    ] = "float32",
    long_text: Annotated[
        options.LongText,
        typer.Option(help="Cut texts that are too long, read them in windows, or stop."),
    ] = "truncate",
    device: options.DEVICE = "auto",
    dtype: options.DTYPE = "auto",
    backend: options.BACKEND = "auto",
    threads: options.THREADS = None,
    max_tokens_per_batch: options.MAX_TOKENS = None,
    block_size: options.BLOCK_SIZE = 1024,
    quiet: options.QUIET = False,
) -> None:
    """Make a vector of each text.

    npy has the vectors in the order of the input; jsonl and parquet have the id of each record
    beside its vector. Memory does not grow with the input. A run that was interrupted goes on
    with --resume, and gives the same bytes as one that was not.

    \b
    Examples:
      encoder-fast embed lines.txt -m ./my-model -o vectors.npy
      encoder-fast embed tickets.csv --column body --id-column id -m ./my-model -o out.parquet
      encoder-fast embed docs.jsonl -m ./my-model -o out.jsonl --long-text chunk --resume
      cat lines.txt | encoder-fast embed - -m ./my-model -o - --normalize > vectors.jsonl
    """
    import numpy as np

    from encoder_fast.cli.job import Job, Results
    from encoder_fast.cli.loading import ModelChoice
    from encoder_fast.cli.output import Output
    from encoder_fast.cli.records import Source
    from encoder_fast.cli.writing import vector_type, write_jsonl, write_npy, write_parquet_of
    from encoder_fast.text import TextEncoder
    from encoder_fast.text.vectors import quantise

    source = Source(input, input_format, column, id_column)
    target = Output(output, format, FORMATS, overwrite=overwrite, resume=resume)
    if id_column is not None and target.format == "npy":
        raise UserError("npy has no place for ids: choose jsonl or parquet, or drop --id-column")
    if precision == "int8" and target.is_stream:
        raise UserError("int8 scales by the range of all vectors, so its output is a file")
    changes = {
        "normalize": normalize,
        "prompt": prompt,
        "truncate_dim": truncate_dim,
        "long_text": long_text,
    }

    def stream(encoder: TextEncoder, texts: Iterable[str], show: bool) -> Iterator[Results]:
        blocks = encoder.encode_stream(
            texts,
            normalize=normalize,
            prompt=prompt,
            truncate_dim=truncate_dim,
            long_text=long_text,
            block_size=block_size,
            show_progress=show,
        )
        for vectors in blocks:
            yield quantise(vectors, "binary") if precision == "binary" else vectors

    def empty(encoder: TextEncoder) -> Results:
        none = encoder.encode([], truncate_dim=truncate_dim, precision=precision)
        assert isinstance(none, np.ndarray)
        return none

    writers = {
        "npy": write_npy,
        "jsonl": write_jsonl,
        "parquet": write_parquet_of(vector_type),
    }
    Job(
        source=source,
        output=target,
        choice=ModelChoice(model, device, dtype, backend, threads, max_tokens_per_batch, pooling),
        stream=stream,
        empty=empty,
        writer=lambda encoder: writers[target.format],
        options={
            "command": "embed",
            **changes,
            "pooling": pooling,
            "precision": precision,
            "block size": block_size,
        },
        finish=_scaled if precision == "int8" else iter,
        check=_check_range if precision == "int8" else lambda count: None,
        quiet=quiet,
    ).run()


def _check_range(count: int) -> None:
    if count == 1:
        raise UserError("int8 scales by the range of several vectors, and the input has one record")


def _scaled(parts: Unfinished) -> Iterator[Part]:
    """Each vector in int8, by the range of all."""
    import numpy as np

    from encoder_fast.cli.parts import Part
    from encoder_fast.text.vectors import quantise

    _check_range(parts.records)
    low, high = np.float32("inf"), np.float32("-inf")
    for part in parts:
        vectors = np.asarray(part.results)
        low = np.minimum(low, vectors.min(axis=0))
        high = np.maximum(high, vectors.max(axis=0))
    for part in parts:
        vectors = np.asarray(part.results)
        yield Part(part.ids, quantise(vectors, "int8", (np.asarray(low), np.asarray(high))))
