"""``encoder-fast bench``: how fast a model runs on this machine, patched and not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from encoder_fast.cli import options
from encoder_fast.cli.errors import UserError
from encoder_fast.cli.tables import show_batch, show_method


def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, or a name on the Hugging Face hub.")
    ],
    length: Annotated[
        list[int] | None,
        typer.Option(
            min=2,
            help="Tokens of the longest text; give it again for several.",
            show_default="64 and 256",
        ),
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts in a batch.")] = 32,
    dtype: Annotated[
        list[options.OneDtype] | None,
        typer.Option(
            help="Give it again for several.",
            show_default="float16 on a GPU; float32 and, where it is fast, bfloat16 on a CPU",
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Measure torch.compile too; compiling takes minutes.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0, help="What the rounds of one batch may take.")
    ] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="The most rounds.")] = 25,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this CSV file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw them to this .png, .svg or .pdf file.")
    ] = None,
    device: options.DEVICE = "auto",
    threads: options.THREADS = None,
) -> None:
    """Measure a model on this machine: Hugging Face eager and SDPA, and patched.

    Each length is run with texts of mixed lengths up to it, and with full ones, without padding.
    All run in turn, round after round, on a CPU each in a process of its own; the median counts.
    Parity is checked first.

    \b
    Examples:
      encoder-fast bench ./my-model
      encoder-fast bench ./my-model --length 128 --length 512 --out bench.csv --plot bench.png
      encoder-fast bench ./my-model --dtype bfloat16 --compile --threads 4
    """
    from rich.console import Console

    from encoder_fast.cli.plot import check_plot, draw

    for option, path in (("--out", out), ("--plot", plot)):
        if path is not None and not os.path.isdir(path.absolute().parent):
            raise UserError(f"{option} {path}: no such folder to write to")
    if plot is not None:
        check_plot(plot)
    console = Console(highlight=False)
    with console.status("loading"):
        import torch

        import encoder_fast
        from encoder_fast.cli.bench_run import Bench, as_csv, default_dtypes
        from encoder_fast.cli.checkpoint import default_device
        from encoder_fast.cli.parts import replace_file
        from encoder_fast.cli.race import Rounds

        if threads is not None:
            torch.set_num_threads(threads)
        where = default_device(encoder_fast.info()) if device == "auto" else device
        dtypes = [getattr(torch, name) for name in dict.fromkeys(dtype or ())]
        running = Bench(
            model,
            device=where,
            dtypes=dtypes or default_dtypes(where),
            lengths=length or (64, 256),
            texts=texts,
            rounds=Rounds(rounds, min(3, rounds), seconds),
            with_compile=compile,
        )
    console.print(f"{running.model}\n{running.place}")
    with console.status("checking parity"):
        running.check()
    results = []
    with console.status("measuring"):
        for result in running.run():
            show_batch(result, console)
            results.append(result)
    show_method(results[0].baseline, console)
    written = {
        out: lambda: as_csv(running, results).encode(),
        plot: lambda: draw(results, f"{running.model}\n{running.place}", str(plot and plot.suffix)),
    }
    for path, content in written.items():
        if path is not None:
            try:
                replace_file(path, content())
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
            console.print(f"Written: {path}")
