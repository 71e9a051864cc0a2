"""A kernel's counts and clocks on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.cost.analysis import Analysis, analyse
from bench.cost.cuda_binary import CompiledKernel
from bench.cost.pipes import CARDS, PIPES, Counts, clocks, resident_blocks


def show_built(console: Console, kernel: CompiledKernel) -> None:
    """One kernel of the built extension."""
    number = int("".join(c for c in kernel.arch if c.isdigit()))
    analysis, card = analyse(kernel.code), CARDS[number]
    warps = kernel.threads // 32
    console.print(f"\n[bold]{kernel.arch} {kernel.name}[/]")
    console.print(
        f"{warps} warps, {kernel.registers} registers, {kernel.stack_bytes} bytes of stack, "
        f"{kernel.resident_blocks} blocks planned on a multiprocessor, "
        f"{resident_blocks(kernel.registers, warps, kernel.shared_bytes, card)} by registers"
    )
    table = Table("", *PIPES, "bound", "in turn", box=None, pad_edge=False)
    for title, counts in parts(analysis):
        found = clocks(counts, warps, card)
        pipe, _ = found.bound
        figures = [f"{getattr(found, name):.0f}" for name in PIPES]
        table.add_row(f"clocks {title}", *figures, pipe, f"{found.in_turn:.0f}")
    console.print(table)
    for title, counts in parts(analysis):
        console.print(f"{title}: {in_words(counts)}")
    console.print(f"barriers there, whichever way it goes: {analysis.barriers}")


def parts(analysis: Analysis) -> list[tuple[str, Counts]]:
    if analysis.step is None:
        return [("whole kernel", analysis.around)]
    return [("loop", analysis.step), ("around it", analysis.around)]


def in_words(counts: Counts) -> str:
    """Everything that a warp does in a pass."""
    shapes = [f"{n} {shape}" for shape, n in counts.shapes.items()]
    units = [
        f"{counts.mufu} MUFU",
        f"{counts.fma} + {counts.fma_heavy} integer FMA",
        f"{counts.alu} ALU",
        f"{counts.lsu} LSU",
        f"{counts.shuffle} shuffles",
        f"{counts.uniform} uniform",
        f"{counts.shared_bytes} bytes of shared and {counts.global_bytes} of global memory",
        f"{counts.barriers} barriers",
        f"{counts.tensor_waits} waits for products",
        f"{counts.copy_waits} for copies",
        f"{counts.issue} instructions in all",
    ]
    return ", ".join([*shapes, *units])
