"""The main loop of a kernel, and what a pass through it and the code around it count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.cost.pipes import Counts, count, work_of
from bench.cost.sass import Graph, Instruction, Loop, Work


@dataclass(frozen=True)
class Analysis:
    """Counts of one warp.

    Attributes:
        step: one pass through the main loop; ``None`` for a kernel without one.
        around: what a tile of the output takes beside the steps, the pass through everything for a
            kernel without a main loop.
        barriers: all in the main loop, or in the kernel, whichever way it goes.
    """

    step: Counts | None
    around: Counts
    barriers: int


def analyse(code: Sequence[Instruction]) -> Analysis:
    graph = Graph(code)
    loops = graph.loops()
    loop = main_loop(graph, loops)
    beside: set[int] = set()
    if count(code).products:
        # Other loops clear rows that belong to nobody, or look for a sequence: not what is timed.
        for other in loops:
            if not count(graph.code_of(other)).products:
                beside |= {instruction.address for instruction in graph.code_of(other)}

    def work(instruction: Instruction) -> Work:
        return (0, 0) if instruction.address in beside else work_of(instruction)

    if loop is None:
        whole = graph.path(None, work)
        return Analysis(None, count(whole), count(code).barriers)
    # A kernel that takes one tile of its output after another has a loop around the main one.
    outer = [o for o in loops if o.blocks > loop.blocks]
    body = min(outer, key=lambda o: len(o.blocks)) if outer else None
    step = count(graph.path(loop, work))
    around = count(graph.path(body, work)) - step
    return Analysis(step, around, count(graph.code_of(loop)).barriers)


def main_loop(graph: Graph, loops: Sequence[Loop]) -> Loop | None:
    """The innermost loop with most of the products or, in a kernel without any, the innermost one
    through which most of its bytes go."""
    if not loops:
        return None
    work = {loop: count(graph.path(loop, work_of)) for loop in loops}
    products = max(counts.products for counts in work.values())
    if products:
        # A loop around it may have a few of its own, such as what the first step needs.
        best = [loop for loop in loops if 2 * work[loop].products > products]
        return min(best, key=lambda loop: len(loop.blocks))
    whole = count(graph.path(None, work_of))
    if whole.products:
        return None
    most = [loop for loop in loops if 2 * work[loop].global_bytes > whole.global_bytes]
    return min(most, key=lambda loop: len(loop.blocks), default=None)
