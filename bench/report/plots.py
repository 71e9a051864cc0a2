"""The pictures of the report: each one as SVG and PNG, for light and for dark pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.report.choice import Case, Device
from bench.report.tables import describe, model_title

# Text, grid and page of GitHub's two themes; colours that keep their contrast on both.
THEMES = {
    "light": {"text": "#1f2328", "grid": "#d1d9e0", "page": "#ffffff"},
    "dark": {"text": "#e6edf3", "grid": "#3d444d", "page": "#0d1117"},
}
OURS_COLOUR = "#e8590c"
_PEERS = ("#1c7ed6", "#37a05a", "#9c5fd6", "#12949f", "#c2528b", "#a08020", "#868e96", "#4c6ef5")
_MARKS = "sD^vPX<>*h"


def draw_all(device: Device, folder: Path) -> list[tuple[str, str]]:
    """Draw what the records hold; the names of the pictures and what each shows."""
    wanted: list[tuple[str, str, Callable[[Any, Device], None], tuple[float, float], str]] = [
        ("speed", "models", _speed, (9, 0), "Speed in units of what people run today"),
        ("latency", "latency", _latency, (9, 4.2), "Median latency by length"),
        ("roofline", "kernels", _roofline, (9, 5.2), "Each op below the roofs of this device"),
    ]
    drawn = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, suite, draw, (width, height), words in wanted:
        if not any(case.ours for case in device.cases(suite)):
            continue
        if not height:
            height = 1.3 + 0.36 * sum(case.ours is not None for case in device.cases(suite))
        for theme in THEMES:
            with _page(theme) as pyplot:
                figure = pyplot.figure(figsize=(width, height), layout="constrained")
                draw(figure, device)
                _save(figure, folder / f"{name}-{theme}")
                pyplot.close(figure)
        drawn.append((name, words))
    return drawn


@contextmanager
def _page(theme: str) -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = THEMES[theme]
    settings = {
        "figure.facecolor": colours["page"],
        "axes.facecolor": colours["page"],
        "savefig.facecolor": colours["page"],
        "axes.edgecolor": colours["grid"],
        "axes.labelcolor": colours["text"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": colours["grid"],
        "grid.linewidth": 0.6,
        "text.color": colours["text"],
        "xtick.color": colours["text"],
        "ytick.color": colours["text"],
        "legend.frameon": False,
        "font.size": 10,
        # the same record gives the same bytes
        "svg.hashsalt": "encoder_fast",
    }
    with pyplot.rc_context(settings):
        yield pyplot


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path.with_name(path.name + ".svg"), metadata={"Date": None})
    figure.savefig(path.with_name(path.name + ".png"), dpi=90, metadata={"Software": None})


def _looks(cases: Sequence[Case]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each contestant; ours are of one colour."""
    names = dict.fromkeys(row.contestant for case in cases for row in case.timed)
    ours = {row.contestant for case in cases for row in case.timed if row.ours}
    peers = [name for name in names if name not in ours]
    looks = {name: (_PEERS[i % 8], _MARKS[i % 10]) for i, name in enumerate(peers)}
    return {**looks, **{name: (OURS_COLOUR, "oPX*"[i % 4]) for i, name in enumerate(sorted(ours))}}


def _speed(figure: Any, device: Device) -> None:
    """A line for each case, a mark for each contestant: right is faster."""
    axes = figure.subplots()
    cases = [case for case in device.cases("models") if case.ours and case.baseline][::-1]
    looks = _looks(cases[::-1])
    for y, case in enumerate(cases):
        baseline = case.baseline
        assert baseline is not None
        for row in case.timed:
            colour, mark = looks[row.contestant]
            x = baseline.median / row.median
            size = 90 if row.ours else 42
            axes.scatter(x, y, s=size, c=colour, marker=mark, zorder=4 if row.ours else 3)
            if row.ours and row is case.ours:
                # above the line, where no other mark is
                axes.annotate(
                    f"{x:.2f}x", (x, y), (0, 6), "data", "offset points", ha="center", size=9
                )
    axes.set_yticks(range(len(cases)), [_label(case) for case in cases])
    axes.axvline(1, color=_baseline_colour(looks), linewidth=1, linestyle="--", zorder=2)
    axes.margins(x=0.1, y=0.6 / max(1, len(cases)))
    axes.set_xlim(left=0)
    axes.set_xlabel("times as fast as Hugging Face SDPA (eager where transformers has no SDPA)")
    _legend(figure, looks, columns=4)


def _baseline_colour(looks: dict[str, tuple[str, str]]) -> str:
    return looks.get("Hugging Face SDPA", ("#868e96", ""))[0]


def _label(case: Case) -> str:
    return f"{model_title(case)}, {case.facts['dtype']}\n{describe(case)}"


def _latency(figure: Any, device: Device) -> None:
    """Length against time, a panel for each batch size of the first model."""
    cases = [case for case in device.cases("latency") if case.ours]
    model = cases[0].facts["model"]
    cases = [case for case in cases if case.facts["model"] == model]
    batches = sorted({case.facts["batch"] for case in cases})
    looks = _looks(cases)
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, count in zip(panels, batches, strict=True):
        mine = [case for case in cases if case.facts["batch"] == count]
        for name, (colour, mark) in looks.items():
            points = [
                (case.facts["longest"], row.median * 1e3)
                for case in mine
                if (row := case.row(name)) is not None
            ]
            width = 2.4 if colour == OURS_COLOUR else 1.3
            axes.plot(*zip(*points, strict=True), color=colour, marker=mark, lw=width, ms=5)
        axes.set(xscale="log", yscale="log", xlabel="tokens of each text", ylabel="ms")
        lengths = sorted({case.facts["longest"] for case in mine})
        axes.set_xticks(lengths, [str(length) for length in lengths])
        low, high = axes.get_ylim()
        decades = (10.0**e for e in range(-3, 5))
        ticks = [t for d in decades for t in (d, 2 * d, 5 * d) if low <= t <= high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(f"{model_title(mine[0])}, {count} text{'s' if count > 1 else ''}", size=10)
    _legend(figure, looks, columns=4)


def _roofline(figure: Any, device: Device) -> None:
    """Operations a byte against operations a second: the roofs, and each op of ours below them."""
    axes = figure.subplots()
    roofs = dict(device.records("kernels")[0].header["roofs"])
    copy = roofs.pop("copy")
    cases = [case for case in device.cases("kernels") if case.ours]
    intensity = [case.facts["operations"] / case.facts["bytes"] for case in cases]
    low, high = min(intensity) / 3, max(max(intensity), max(roofs.values()) / copy) * 3
    top = max(roofs.values())
    axes.plot([low, top / copy], [low * copy / 1e9, top / 1e9], color="#868e96", lw=1.4)
    axes.annotate(
        f"copy, {copy / 1e9:,.0f} GB/s",
        (low * 1.5, low * 1.5 * copy / 1e9),
        (4, 10),
        textcoords="offset points",
        size=9,
    )
    for name, rate in roofs.items():
        axes.plot([rate / copy, high], [rate / 1e9] * 2, color="#868e96", lw=1.4)
        axes.annotate(
            f"GEMM {name}, {rate / 1e9:,.0f} GFLOP/s",
            (high, rate / 1e9),
            (0, 4),
            textcoords="offset points",
            size=9,
            ha="right",
        )
    ops = dict.fromkeys(case.facts["op"] for case in cases)
    dtypes = list(dict.fromkeys(case.facts["dtype"] for case in cases))
    # An op has a colour, a dtype a marker.
    colours = (OURS_COLOUR, *_PEERS)
    for i, op in enumerate(ops):
        for j, dtype in enumerate(dtypes):
            mine = [c for c in cases if (c.facts["op"], c.facts["dtype"]) == (op, dtype)]
            x = [c.facts["operations"] / c.facts["bytes"] for c in mine]
            y = [c.facts["operations"] / c.ours.median / 1e9 for c in mine if c.ours]
            label = f"{op}, {dtype}"
            axes.scatter(
                x, y, s=48, c=colours[i % len(colours)], marker=_MARKS[j], label=label, zorder=3
            )
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set(xlabel="operations a byte that must move", ylabel="GFLOP/s")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)


def _legend(figure: Any, looks: dict[str, tuple[str, str]], columns: int) -> None:
    from matplotlib.lines import Line2D

    ordered = sorted(looks.items(), key=lambda item: item[1][0] != OURS_COLOUR)
    handles = [
        Line2D([], [], color=colour, marker=mark, linestyle="", label=name)
        for name, (colour, mark) in ordered
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)
