"""Latency against rate, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.ticket_routing.errors import TicketError
from examples.ticket_routing.stream import Measured
from examples.ticket_routing.sweep import typical

# Told apart by lightness as well as by hue.
_COLOURS = ("#d1495b", "#0b6e4f")


def plot(points: Mapping[str, Sequence[Measured]], limit: float, title: str, path: Path) -> None:
    """Median and 99th percentile of each system, and the limit.

    Raises:
        TicketError: matplotlib is not installed, or the picture can't be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    except ImportError:
        raise TicketError("--plot needs matplotlib: pip install matplotlib") from None
    # not pyplot, which keeps figures and looks for a display; white, also on a dark page
    figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for colour, (name, measured) in zip(_COLOURS, points.items(), strict=False):
        ordered = typical(measured)
        rates = [one.rate for one in ordered]
        for percent, style in ((99, "-o"), (50, "--")):
            values = [one.latencies.percentile(percent) * 1e3 for one in ordered]
            label = f"{name}, {'p99' if percent == 99 else 'median'}"
            axes.plot(rates, values, style, color=colour, label=label, linewidth=2, markersize=5)
    axes.axhline(limit * 1e3, color="#555555", linewidth=1, linestyle=":")
    axes.annotate(
        f"{limit * 1e3:g} ms",
        (0.995, limit * 1e3),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color="#333333",
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(left=0)
    axes.set_xlabel("tickets a second, Poisson arrivals")
    axes.set_ylabel("latency in ms, from the scheduled arrival")
    axes.set_title(title, fontsize=10)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise TicketError(f"--plot {path}: {error.strerror}") from None
