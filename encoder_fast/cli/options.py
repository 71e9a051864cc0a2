"""Arguments and options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import typer

LongText = Literal["truncate", "chunk", "error"]
InputFormat = Literal["text", "csv", "jsonl", "parquet"]
Backend = Literal["auto", "cpu", "triton", "cuda", "reference"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]


class OneDtype(StrEnum):
    """A dtype by name: typer takes lists of enumerations, but not of literals."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


INPUT = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="A file of texts, one a line (.txt), or of records (.csv, .tsv, .jsonl, .parquet); "
        "- reads standard input.",
        show_default=False,
    ),
]
MODEL = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A folder, or a name on the Hugging Face hub.", show_default=False
    ),
]
OUTPUT_HELP = "The file to write; - is standard output, as jsonl or csv."
INPUT_FORMAT = Annotated[
    InputFormat | None,
    typer.Option(help="What INPUT is.", show_default="by its name; text for -"),
]
COLUMN = Annotated[
    str | None, typer.Option(help="The column or key with the texts.", show_default="text")
]
ID_COLUMN = Annotated[
    str | None,
    typer.Option(help="The column or key with ids.", show_default="the record's number, from 0"),
]
RESUME = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on with an interrupted run of the same, or begin if there is none."
    ),
]
OVERWRITE = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output, once the new one is whole.")
]
DEVICE = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")]
DTYPE = Annotated[Dtype, typer.Option(help="What the model computes in; auto is its files' own.")]
BACKEND = Annotated[
    Backend, typer.Option(help="One that is asked for by name runs or is an error.")
]
THREADS = Annotated[
    int | None, typer.Option(min=1, help="CPU threads.", show_default="PyTorch's choice")
]
MAX_TOKENS = Annotated[
    int | None,
    typer.Option(
        min=1, help="The most tokens in a batch.", show_default="by device and free memory"
    ),
]
BLOCK_SIZE = Annotated[
    int,
    typer.Option(min=1, help="Records in memory and, at the most, lost by an interruption."),
]
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")]
