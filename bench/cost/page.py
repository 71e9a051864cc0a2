"""docs/kernels/cost.md: every kernel's clocks by pipe, and the times they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.cost.measure import Cost, Prediction, predict
from bench.cost.pipes import CARDS, PARTS, PIPES, Card
from bench.cost.sizes import HEADS, TOKENS

TITLES = {"mufu": "MUFU", "fma": "FMA", "alu": "ALU"}

HEAD = """\
# What the kernels cost

**All times on this page are predicted; nothing was measured.** `make cost` writes it. Each kernel
is compiled as its launcher has it compiled, for cards that are not there, and the instructions of
its machine code are counted by the unit that runs them ({by}).
`python -m bench cost REGEX` prints single kernels in detail. The counts are in
`bench/cost/costs.json`; `tests/test_cost_guard.py` fails where a main kernel takes more.

## How to read it

A pass is one step of the main loop, or the whole kernel where there is none. Its clocks are how
long each unit of a multiprocessor is busy with one block. The busiest unit is the bound: no other
order of the same instructions is faster. `in turn` adds the tensor cores' clocks to those of the
busiest other unit: a kernel takes that long if its products never overlap with the rest.

- The main loop is the innermost one with the most products, or the one through which most bytes of
  global memory go. The count follows its shortest pass that does all the work, so it leaves out the
  mask of a last tile, rare rescalings and slow cases.
- `shared` is bytes through the banks of shared memory, at 128 a clock: loads and stores (an
  `ldmatrix` of four has 512), what asynchronous copies write, and what `wgmma` reads, A of 64 rows
  and B of N columns, each 16 deep. Shuffles may go the same way; they are listed by themselves.
- `issue` is all instructions, one a clock for each of the four parts of a multiprocessor.
- `pack_mask` and the list of attention's tiles are left out: they move less than a megabyte.
- The table knows no latencies, waits, bank conflicts, caches or launches. It takes the last wave of
  blocks for a full one.
- Times are for {tokens:,} tokens, {heads} heads and bfloat16. `memory` is each byte moved once, at
  the rate of a copy. A prediction is a range, from the larger of memory and pipes to the larger of
  memory and in turn. Published kernels of this kind are at its slow end and beyond: on an H100, at
  D = 64 and S = 512, FlashAttention-2 reaches 282 TFLOP/s and Triton's tutorial 340.
- The mnemonics of `tcgen05` (sm_100) name no sizes: clocks of tensor cores are the work divided by
  the rate, and what they read from shared memory is not counted.

## Rates
"""

RATES = """\
The programming guide is NVIDIA's for CUDA C++, "throughput of native arithmetic instructions".
Tensor cores: the data sheets' dense 16-bit peaks are 312, 989 and 2,250 TFLOP/s. By multiprocessor
and clock they make 1,024, 2,048 and 4,096 multiply-adds, which the clocks above are rounded to; at
an H100's 1.755 GHz 989 TFLOP/s would be 2,135, and times by the 2,048 are 4% longer than here.
`mma.sync` was measured at 62% of an H100's peak (arXiv 2402.13499). For Blackwell the same
instructions a clock as on Hopper are assumed. Memory is taken for 1.75, 3.0 and 7.0 TB/s in a copy,
on cards of 2.04, 3.35 and 8.0 TB/s.
"""


def page(compilers: dict[str, str], costs: Sequence[Cost]) -> str:
    by = ", ".join(f"{name} {version}" for name, version in compilers.items())
    lines = [HEAD.format(by=by, tokens=TOKENS, heads=HEADS), *_rates(), "", RATES]
    for arch, card in CARDS.items():
        here = [cost for cost in costs if cost.arch == arch]
        if here:
            lines += [f"## {card.name}, sm_{arch}", "", *_clocks(here), "", *_times(here), ""]
    return "\n".join(lines).rstrip() + "\n"


def _rates() -> Iterator[str]:
    cards = CARDS.values()
    guide = "programming guide"
    rows: list[tuple[str, Callable[[Card], str], str]] = [
        ("multiprocessors", lambda c: f"{c.multiprocessors}", "data sheet"),
        ("clock at the tensor peak, GHz", lambda c: f"{c.clock / 1e9:.2f}", "below"),
        ("tensor cores, 16-bit multiply-adds", lambda c: f"{c.tensor:,}", "below"),
        ("of them by mma.sync", lambda c: f"{c.mma_share:.0%}", "below"),
        ("MUFU and conversions, lanes", lambda c: f"{PARTS * c.special}", guide),
        ("FMA: float32, lanes", lambda c: f"{PARTS * c.fp32}", guide),
        ("FMA: integers, lanes", lambda c: f"{PARTS * c.integer}", guide),
        ("ALU, lanes", lambda c: f"{PARTS * c.alu}", guide),
        ("shared memory, bytes", lambda c: f"{c.shared}", "32 banks of 4 bytes"),
        ("shuffles, lanes", lambda c: f"{c.shuffle}", guide),
        ("issue, instructions", lambda c: f"{PARTS}", "one for each part"),
        ("copy through memory, TB/s", lambda c: f"{c.copy / 1e12:.2f}", "86 to 90% of the sheet"),
    ]
    yield "| a clock of a multiprocessor | " + " | ".join(c.name for c in cards) + " | from |"
    yield "|---|" + "---:|" * len(cards) + "---|"
    for title, value, source in rows:
        yield f"| {title} | " + " | ".join(map(value, cards)) + f" | {source} |"


def _clocks(costs: Sequence[Cost]) -> Iterator[str]:
    titles = [TITLES.get(pipe, pipe) for pipe in PIPES]
    header = ["kernel", "tile", "warps", "registers", "blocks", "pass", *titles]
    header += ["in turn", "bound", "barriers"]
    yield "| " + " | ".join(header) + " |"
    yield "|---|---|" + "---:|" * 3 + "---|" + "---:|" * (len(PIPES) + 1) + "---|---:|"
    for cost in costs:
        step, around = cost.clocks()
        found = around if step is None else step
        stages = f", {cost.stages} stages" if cost.stages and cost.stages > 1 and step else ""
        spills = f" and {cost.spills_bytes} bytes spilled" if cost.spills_bytes else ""
        row = [
            cost.case.key,
            cost.cut.text + stages,
            str(cost.cut.warps or cost.warps),
            f"{cost.registers}{spills}",
            str(cost.resident),
            "whole" if step is None else "step",
            *(f"{getattr(found, pipe):.0f}" for pipe in PIPES),
            f"{found.in_turn:.0f}",
            TITLES.get(found.bound[0], found.bound[0]),
            str(cost.analysis.barriers),
        ]
        yield "| " + " | ".join(row) + " |"


def _times(costs: Sequence[Cost]) -> Iterator[str]:
    header = ["kernel", "size", "bound", "memory, µs", "pipes, µs", "in turn, µs", "predicted"]
    yield "| " + " | ".join(header) + " |"
    yield "|---|---|---|---:|---:|---:|---|"
    for cost in costs:
        for size in cost.case.sizes:
            found = predict(cost, size)
            row = [
                cost.case.key,
                size.name,
                TITLES.get(found.bound, found.bound),
                *(f"{1e6 * t:.1f}" for t in (found.memory, found.overlapped, found.in_turn)),
                _rate(found, cost.card),
            ]
            yield "| " + " | ".join(row) + " |"


def _rate(found: Prediction, card: Card) -> str:
    least, most = 1e6 * found.least, 1e6 * found.most
    time = f"{least:.0f} µs" if f"{least:.0f}" == f"{most:.0f}" else f"{least:.0f} to {most:.0f} µs"
    if not found.size.operations:
        share = found.size.moved / found.least / 1e12
        return f"{time}, {share:.2f} TB/s"
    slow, fast = (found.size.operations / t / 1e12 for t in (found.most, found.least))
    rate = f"{slow:.0f}" if f"{slow:.0f}" == f"{fast:.0f}" else f"{slow:.0f} to {fast:.0f}"
    return f"{time}, {rate} TFLOP/s"
