"""The figures of ``encoder-fast bench`` as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from encoder_fast.cli.errors import UserError

if TYPE_CHECKING:
    from encoder_fast.cli.measuring import BatchResult

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise :class:`UserError` where no plot can be drawn to ``path``."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--plot {path}: the name must end in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'encoder-fast[plot]'") from None


def draw(results: Sequence[BatchResult], title: str, suffix: str) -> bytes:
    """Real tokens a second of each contestant, batch by batch, as an image file's bytes."""
    from matplotlib.figure import Figure

    labels = [timing.label for timing in results[0].timings]
    figure = Figure(figsize=(2.5 + 1.8 * len(results), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        places = [batch + (i - (len(labels) - 1) / 2) * width for batch in range(len(results))]
        timings = [result.timings[i] for result in results]
        speeds = [r.tokens / t.median for r, t in zip(results, timings, strict=True)]
        bars = axes.bar(places, speeds, width, label=label)
        axes.bar_label(
            bars,
            [f"{r.speedup(t):.2f}x" for r, t in zip(results, timings, strict=True)],
            fontsize=7,
            padding=1,
        )
    names = [f"{result.name} tokens\n{result.padding:.0%} padding" for result in results]
    axes.set_xticks(range(len(results)), names)
    axes.set_ylabel("real tokens a second")
    axes.set_title(title, fontsize=9, wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format=suffix.removeprefix(".").lower(), dpi=150)
    return image.getvalue()
