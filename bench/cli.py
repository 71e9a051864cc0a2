"""``python -m bench``: one command a suite, and what is made of the records."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bench.session import Session

SUITES = ("kernels", "models", "latency", "texts")

# With contestants that compile.
COMPILED_SUITES = ("kernels", "models")

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Benchmarks of encoder_fast. Run from the repository's root.",
)

Filter = Annotated[
    str, typer.Option(help="Words that a case's name must all hold, such as 'attention base fp32'.")
]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer cases and rounds.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for the record.", show_default="bench/results/<device>")
]
Own = Annotated[
    Path | None,
    typer.Option(
        help="A file with texts, one a line, in place of the suite's: more contestants take part.",
        exists=True,
        dir_okay=False,
        show_default=False,
    ),
]
Model = Annotated[
    Path | None,
    typer.Option(
        help="A folder with all-MiniLM-L6-v2 for the texts.",
        exists=True,
        file_okay=False,
        show_default="the package that carries it",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="PyTorch's")]
Fake = Annotated[
    bool,
    typer.Option(
        "--fake",
        help="The GPU's commands in miniature on a CPU, to see that they run. Needs --out.",
    ),
]


@app.command()
def kernels(
    filter: Filter = "",
    quick: Quick = False,
    out: Out = None,
    threads: Threads = None,
    fake: Fake = False,
) -> None:
    """Single ops: time, share of the roof, and peers."""
    _run(("kernels",), filter, quick, out, threads, fake)


@app.command()
def models(
    filter: Filter = "",
    quick: Quick = False,
    out: Out = None,
    threads: Threads = None,
    fake: Fake = False,
) -> None:
    """Whole models over batches: tokens a second, peak memory, and peers."""
    _run(("models",), filter, quick, out, threads, fake)


@app.command()
def latency(
    filter: Filter = "",
    quick: Quick = False,
    out: Out = None,
    threads: Threads = None,
    fake: Fake = False,
) -> None:
    """One text and eight, from 16 to 512 tokens: median and worst of a hundred."""
    _run(("latency",), filter, quick, out, threads, fake)


@app.command()
def texts(
    filter: Filter = "",
    quick: Quick = False,
    out: Out = None,
    threads: Threads = None,
    fake: Fake = False,
    own: Own = None,
    model: Model = None,
) -> None:
    """From strings to vectors, tokenizer included."""
    try:
        if own is not None and not own.read_text(encoding="utf-8").strip():
            raise typer.BadParameter(f"no text in {own}")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{own} is not UTF-8: {error}") from None
    _run(("texts",), filter, quick, out, threads, fake, own, model)


@app.command(name="all")
def all_suites(
    filter: Filter = "",
    quick: Quick = False,
    out: Out = None,
    threads: Threads = None,
    fake: Fake = False,
    model: Model = None,
) -> None:
    """The four suites, into one record."""
    _run(SUITES, filter, quick, out, threads, fake, minilm=model)


@app.command()
def carry(
    folder: Annotated[
        Path | None, typer.Argument(help="Where to.", show_default=".cache/minilm-fp16")
    ] = None,
) -> None:
    """Write all-MiniLM-L6-v2 in float16, for a machine where its package can't be installed."""
    from bench.minilm import FOLDER, write

    quieten_libraries()
    size = write(folder or FOLDER)
    print(f"{(folder or FOLDER).name}: {size / 2**20:.0f} MiB")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A record.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="A later one.", show_default=False)],
) -> None:
    """What changed for encoder_fast from record A to record B, and what only chance moved."""
    from bench.compare import compare as compare_records
    from bench.compare_show import show
    from bench.record import read

    try:
        found = compare_records(read(a), read(b))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    show(found)


@app.command()
def report(
    results: Annotated[
        Path | None, typer.Option(help="Folder of records.", show_default="bench/results")
    ] = None,
    docs: Annotated[Path | None, typer.Option(help="Folder to write to.", show_default="docs")] = (
        None
    ),
) -> None:
    """Write docs/performance.md and its pictures from the newest records of each device."""
    from bench.record import RESULTS
    from bench.report.page import write_report
    from bench.sources import ROOT

    try:
        path = write_report(results or RESULTS, docs or ROOT / "docs")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    print(f"wrote {path.name} and its pictures")


@app.command()
def tune(filter: Filter = "", out: Out = None, fake: Fake = False) -> None:
    """Search launch configurations for this card and write kernels/launch_table.json."""
    if fake:
        if out is None:
            raise typer.BadParameter("--fake needs --out: its winners must not be launched")
        prepare_interpreter()
    from bench.machine import find_machine
    from bench.sources import ROOT
    from bench.tune import tune as search_all

    machine = find_machine(fake=fake)
    if not (machine.is_gpu or fake):
        raise typer.BadParameter("there is no GPU here to tune for")
    path = (out or ROOT / "kernels") / "launch_table.json"
    search_all(machine, path, filter.split())


@app.command()
def cost(
    kernel: Annotated[
        str | None,
        typer.Argument(
            help="Print the kernels whose names this regular expression is found in.",
            show_default="write the table of all",
        ),
    ] = None,
    arch: Annotated[int, typer.Option(help="For printing: 80, 90 or 100.")] = 90,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for cost.md and costs.json.", show_default="docs/kernels and bench/cost"
        ),
    ] = None,
) -> None:
    """What kernels take of a card by their machine code; needs Triton or nvcc, and no GPU."""
    from bench.cost import record
    from bench.cost.pipes import CARDS
    from bench.cost.run import show_kernels, write_table
    from bench.sources import ROOT

    if kernel is None:
        page = (out or ROOT / "docs" / "kernels") / "cost.md"
        counts = record.PATH if out is None else out / record.PATH.name
        try:
            write_table(page, counts)
        except RuntimeError as error:
            raise typer.BadParameter(str(error)) from None
        print(f"wrote {page.name} and {counts.name}")
        return
    if arch not in CARDS:
        raise typer.BadParameter(f"--arch must be one of {sorted(CARDS)}, got {arch}")
    if not show_kernels(kernel, arch):
        raise typer.BadParameter(f"no kernel has {kernel!r} in its name")


@app.command()
def sweep(
    check: Annotated[
        bool, typer.Option("--check", help="Small inputs, not timed, for a sanitizer.")
    ] = False,
    backend: Annotated[
        str | None, typer.Option(help="One backend.", show_default="all that are here")
    ] = None,
    fake: Fake = False,
) -> None:
    """Our kernels over many shapes, without peers: errors and times in under a minute."""
    if fake:
        prepare_interpreter()
    from bench.machine import find_machine
    from bench.sweep import sweep as sweep_all

    machine = find_machine(fake=fake)
    if not (machine.is_gpu or fake):
        raise typer.BadParameter("there is no GPU here")
    backends = (backend,) if backend else machine.backends
    if not sweep_all(machine, backends, check=check):
        raise typer.Exit(1)


@app.command()
def parity(
    quick: Quick = False,
    docs: Annotated[Path | None, typer.Option(help="Folder to write to.", show_default="docs")] = (
        None
    ),
    fake: Fake = False,
) -> None:
    """Write docs/parity.md: errors by family, dtype and layer, labels, retrieval, batch-mates."""
    if fake:
        if docs is None:
            raise typer.BadParameter("--fake needs --docs")
        prepare_interpreter()
    from bench.machine import find_machine
    from bench.parity_page import write_page
    from bench.sources import ROOT

    quieten_libraries()
    path = (docs or ROOT / "docs") / "parity.md"
    if not write_page(find_machine(fake=fake), path, quick=quick):
        print("bench: the parity rule is broken, see parity.md", file=sys.stderr)
        raise typer.Exit(1)
    print(f"wrote {path.name}")


def _run(
    suites: tuple[str, ...],
    wanted: str,
    quick: bool,
    out: Path | None,
    threads: int | None,
    fake: bool,
    own_texts: Path | None = None,
    minilm: Path | None = None,
) -> None:
    if fake:
        if out is None:
            raise typer.BadParameter("--fake needs --out: its figures are no measurements")
        prepare_interpreter()
        quick = True
    from bench.machine import find_machine
    from bench.record import RecordWriter
    from bench.session import LostContextError, Session

    quieten_libraries()
    name = suites[0] if len(suites) == 1 else "all"
    machine = find_machine(fake=fake, threads=threads)
    writer = RecordWriter(machine, name, quick=quick, folder=out)
    session = Session(machine, writer, quick, tuple(wanted.split()), own_texts, minilm)
    session.console.print(f"[bold]{machine.name}[/], {machine.threads} CPU threads")
    try:
        for suite in suites:
            _suite(suite, session)
        if machine.is_gpu:
            session.compiling = True
            for suite in suites:
                if suite in COMPILED_SUITES:
                    _suite(suite, session)
        writer.finish()
    except KeyboardInterrupt:
        session.console.print("stopped; what was measured is in the record")
        raise typer.Exit(130) from None
    except LostContextError as error:
        print(f"bench: stopped, the CUDA context is lost: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    finally:
        session.console.print(f"record: {writer.path.parent.name}/{writer.path.name}")
    if session.broken:
        for line in session.broken:
            print(f"bench: {line}", file=sys.stderr)
        raise typer.Exit(1)


def _suite(name: str, session: Session) -> None:
    import importlib

    importlib.import_module(f"bench.suites.{name}").run(session)


def prepare_interpreter() -> None:
    """Have Triton run its kernels on the CPU, and rightly so with the NumPy of today."""
    # Read when triton is first imported, which nothing here has done before.
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from triton_interpreter import repair_interpreter

    repair_interpreter()


def quieten_libraries() -> None:
    """Progress bars and remarks on checkpoints would stand between the results."""
    import logging
    import warnings

    os.environ["HF_HUB_OFFLINE"] = "1"
    # the profiler of PyTorch, which tells of each start and stop
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    for library in ("torch", "torch._inductor", "torch.onnx", "nncf", "openvino"):
        logging.getLogger(library).setLevel(logging.ERROR)


def main() -> None:
    app()
