"""The run from the first ticket to the last figure, a section a function."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console

from encoder_fast import TextEncoder
from examples.ticket_routing import record, show
from examples.ticket_routing.batching import Limits
from examples.ticket_routing.desk import Desk
from examples.ticket_routing.encoders import Encoder, Packed, Padded, bundled_model, load
from examples.ticket_routing.errors import TicketError
from examples.ticket_routing.learn import Learned, Verdict, judge, learn
from examples.ticket_routing.plot import plot
from examples.ticket_routing.stream import Measured, Stream
from examples.ticket_routing.sweep import highest_held, rates_for, sweep
from examples.ticket_routing.tickets import Ticket, read_csv, read_sample, split

WINDOW = 1000
"""How many of the last tickets a new one is compared with."""

# On two CPU cores 1,024 held more than 128, 256 and 512 did.
CPU_BUDGET, GPU_BUDGET = 1024, 16384

SAME = ("model", "dtype", "device", "backend", "versions", "limits", "tickets")
"""What runs whose rates are shown together must have in common, by the record's keys."""

ROUNDS = 3
"""How often throughput is measured."""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line's options; times in seconds."""

    csv: Path | None
    text_column: str
    label_column: str
    cut: int | None
    model: str | None
    device: str
    dtype: str
    threads: int | None
    accuracy: float
    rate: float
    seconds: float
    fewest: int
    max_wait: float
    budget: int | None
    sweep: bool
    rates: Sequence[float] | None
    add: Sequence[Path]
    limit: float
    plot: Path | None
    out: Path | None
    seed: int


def run(options: Options) -> None:
    """Everything, in order.

    Raises:
        TicketError: what the user gave can't be used.
    """
    # TextEncoder says after each batch how many texts it cut; here that is said once, at the end
    warnings.filterwarnings("ignore", message=".* were cut")
    transformers.utils.logging.disable_progress_bar()
    console = Console(highlight=False)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    tickets = _read(options)
    known, held_out = split(tickets, options.seed)
    with console.status("loading the model"):
        path = options.model or bundled_model()
        encoder = load(path, options.device, options.dtype)
        systems = _systems(encoder, path)
    figures = record.place() | _describe(encoder, options)
    show.place(console, figures, known, held_out)

    with console.status("learning"):
        packed = systems[Packed.name]
        learned, verdict = _learn(packed, known, held_out, options)
    figures |= {
        "tickets": {"learned": len(known), "held_out": len(held_out), "cut": options.cut},
        "thresholds": {"sure": learned.sure, "alike": learned.alike},
        "cross_validated_accuracy": learned.accuracy,
        "verdict": record.verdict(verdict),
    }
    show.verdict(console, learned, verdict, options.accuracy)

    texts = [ticket.text for ticket in held_out]
    with console.status("measuring throughput"):
        seconds = _throughput(systems, texts)
    figures["throughput"] = {
        "tickets": len(texts),
        "seconds": seconds,
        "tickets_per_second": {n: len(texts) / median(s) for n, s in seconds.items()},
    }
    show.throughput(console, figures["throughput"])

    limits = Limits(options.max_wait, options.budget or _budget(encoder))
    figures["limits"] = {
        "max_wait_ms": options.max_wait * 1e3,
        "budget": limits.budget,
        "p99_ms": options.limit * 1e3,
    }
    stream = Stream(texts, limits)
    desks = {name: _desk(system, learned) for name, system in systems.items()}
    for desk in desks.values():
        stream.warm_up(desk)
    if options.sweep:
        _sweep(console, stream, desks, figures, options)
    else:
        _serve(console, stream, _desk(packed, learned), held_out, figures, options)
    show.cut(console, encoder)
    if options.out is not None:
        record.write(options.out, figures)
        console.print(f"Every figure is in {options.out}.")


def _read(options: Options) -> list[Ticket]:
    if options.csv is None:
        tickets = read_sample()
    else:
        tickets = read_csv(options.csv, options.text_column, options.label_column)
    # long tickets set the latency of the slowest; what they are about is mostly said at once
    return [replace(ticket, text=ticket.text[: options.cut]) for ticket in tickets]


def _systems(encoder: TextEncoder, path: str) -> dict[str, Encoder]:
    """The model as it came, and as encoder_fast runs it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return {Padded.name: Padded(encoder, tokenizer), Packed.name: Packed(encoder)}


def _describe(encoder: TextEncoder, options: Options) -> dict[str, Any]:
    report = encoder.report()
    if report.refusal is not None:
        raise TicketError(f"--model {options.model}: no fast path, {report.refusal}")
    return {
        "model": Path(options.model).name if options.model else "all-MiniLM-L6-v2",
        "dtype": str(encoder.model.dtype).removeprefix("torch."),
        "backend": report.model.encoders[0].backend,
    }


def _budget(encoder: TextEncoder) -> int:
    return CPU_BUDGET if encoder.model.device.type == "cpu" else GPU_BUDGET


def _learn(
    packed: Encoder, known: Sequence[Ticket], held_out: Sequence[Ticket], options: Options
) -> tuple[Learned, Verdict]:
    vectors = packed.encode_all([ticket.text for ticket in known])
    learned = learn(known, vectors, accuracy=options.accuracy, seed=options.seed)
    unseen = packed.encode_all([ticket.text for ticket in held_out])
    return learned, judge(learned, held_out, unseen)


def _throughput(systems: Mapping[str, Encoder], texts: Sequence[str]) -> dict[str, list[float]]:
    """The seconds that each system takes for all texts at once, in turn, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(1 + ROUNDS):
        for name, system in systems.items():
            start = time.perf_counter()
            system.encode_all(texts)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def _desk(system: Encoder, learned: Learned) -> Desk:
    return Desk(system, learned.head, window=WINDOW, sure=learned.sure, alike=learned.alike)


def _serve(
    console: Console,
    stream: Stream,
    desk: Desk,
    held_out: Sequence[Ticket],
    figures: dict[str, Any],
    options: Options,
) -> None:
    with console.status(f"serving {options.rate:g} tickets a second"):
        seconds = max(options.seconds, options.fewest / options.rate)
        measured = stream.measure(desk, options.rate, seconds, options.seed)
    show.decisions(console, measured, held_out)
    show.latencies(console, {Packed.name: [measured]}, options.limit)
    figures["points"] = {Packed.name: record.points([measured])}


def _sweep(
    console: Console,
    stream: Stream,
    desks: Mapping[str, Desk],
    figures: dict[str, Any],
    options: Options,
) -> None:
    best = max(figures["throughput"]["tickets_per_second"].values())
    rates = options.rates or rates_for(best)
    points: dict[str, list[Measured]] = {name: [] for name in desks}
    for path in options.add:
        same = {key: figures[key] for key in SAME}
        for name, earlier in record.read_points(path, same).items():
            points[name] += earlier
    with console.status("raising the rate") as status:
        for name, measured in sweep(
            stream,
            desks,
            rates,
            seconds=options.seconds,
            tickets=options.fewest,
            limit=options.limit,
            seed=options.seed,
        ):
            points[name].append(measured)
            p99 = measured.latencies.percentile(99) * 1e3
            status.update(f"{measured.rate:g} tickets a second, {name}: p99 {p99:.1f} ms")
    held = {name: highest_held(of_one, options.limit) for name, of_one in points.items()}
    show.latencies(console, points, options.limit)
    show.held(console, held, options.limit)
    figures["points"] = {name: record.points(of_one) for name, of_one in points.items()}
    figures["highest_rate_held"] = held
    if options.plot is not None:
        title = f"Ticket routing: {figures['model']}, {figures['dtype']}, {figures['device']}"
        plot(points, options.limit, title, options.plot)
        console.print(f"The plot is in {options.plot}.")
