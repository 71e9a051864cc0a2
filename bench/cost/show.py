"""A kernel's clocks and counts on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.cost.analysis import Analysis
from bench.cost.measure import Cost
from bench.cost.page import TITLES
from bench.cost.pipes import CARDS, PIPES, Counts, clocks


def show(
    console: Console, title: str, arch: int, warps: int, resources: str, analysis: Analysis
) -> None:
    console.print(f"\n[bold]sm_{arch} {title}[/]\n{warps} warps, {resources}")
    pipes = [TITLES.get(pipe, pipe) for pipe in PIPES]
    table = Table("clocks", *pipes, "in turn", "bound", box=None, pad_edge=False)
    for name, counts in parts(analysis):
        found = clocks(counts, warps, CARDS[arch])
        pipe, _ = found.bound
        figures = [f"{getattr(found, name):.0f}" for name in PIPES]
        table.add_row(name, *figures, f"{found.in_turn:.0f}", TITLES.get(pipe, pipe))
    console.print(table)
    for name, counts in parts(analysis):
        console.print(f"{name}: {in_words(counts)}")
    if analysis.step is not None:
        console.print(f"barriers in the loop, whichever way it goes: {analysis.barriers}")


def show_cost(console: Console, cost: Cost) -> None:
    resources = [
        f"{cost.registers} registers",
        f"{cost.shared_bytes} bytes of shared memory",
        f"{cost.spills_bytes} bytes spilled",
        f"{cost.resident} blocks resident",
    ]
    title = f"{cost.case.key}, {cost.cut.text}"
    show(console, title, cost.arch, cost.warps, ", ".join(resources), cost.analysis)


def parts(analysis: Analysis) -> list[tuple[str, Counts]]:
    if analysis.step is None:
        return [("whole", analysis.around)]
    return [("step", analysis.step), ("around", analysis.around)]


def in_words(counts: Counts) -> str:
    """Everything that a warp does in a pass."""
    shapes = [f"{n} {shape}" for shape, n in counts.shapes.items()]
    units = [
        f"{counts.mufu} MUFU",
        f"{counts.fma} FMA and {counts.fma_heavy} of integers",
        f"{counts.alu} ALU",
        f"{counts.lsu} LSU",
        f"{counts.shuffle} shuffles",
        f"{counts.uniform} uniform",
        f"{counts.shared_bytes} bytes of shared and {counts.global_bytes} of global memory",
        f"{counts.barriers} barriers",
        f"{counts.tensor_waits} waits for products and {counts.copy_waits} for copies",
        f"{counts.issue} instructions in all",
    ]
    return ", ".join([*shapes, *units])
