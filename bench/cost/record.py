"""The recorded counts, in bench/cost/costs.json: what a test compares those of today with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cost.measure import Cost
from bench.cost.pipes import Counts, clocks

PATH = Path(__file__).with_name("costs.json")

# A pipe may be busy so much longer before it counts as a regression.
MARGIN = 0.03

Entry = dict[str, Any]


def entry(cost: Cost) -> Entry:
    step = cost.analysis.step
    return {
        "kernel": cost.case.key,
        "arch": cost.arch,
        "tile": cost.cut.text,
        "warps": cost.cut.warps or cost.warps,
        "stages": cost.stages,
        "registers": cost.registers,
        "spills_bytes": cost.spills_bytes,
        "shared_bytes": cost.shared_bytes,
        "resident_blocks": cost.resident,
        "barriers": cost.analysis.barriers,
        "step": None if step is None else asdict(step),
        "around": asdict(cost.analysis.around),
    }


def write(path: Path, compilers: dict[str, str], costs: Iterable[Cost]) -> None:
    """One line a kernel, so that a difference shows what changed."""
    lines = ",\n".join(json.dumps(entry(cost)) for cost in costs)
    path.write_text(f'{{"compilers": {json.dumps(compilers)},\n"kernels": [\n{lines}\n]}}\n')


def read(path: Path = PATH) -> tuple[dict[str, str], dict[tuple[str, int], Entry]]:
    """The compilers, and the entries by kernel and architecture."""
    content = json.loads(path.read_text())
    return content["compilers"], {(e["kernel"], e["arch"]): e for e in content["kernels"]}


def regressions(cost: Cost, recorded: Entry) -> list[str]:
    """What got worse than it was recorded, one readable line each."""
    now = entry(cost)
    found = []

    def compare(what: str, before: float, after: float, margin: float = 0.0) -> None:
        if after > before * (1 + margin):
            found.append(f"{what}: {before:g} recorded, {after:g} now")

    if cost.resident < recorded["resident_blocks"]:
        found.append(
            f"resident blocks: {recorded['resident_blocks']} recorded, {cost.resident} now"
        )
    for what in ("spills_bytes", "barriers"):
        compare(what, recorded[what], now[what])
    if cost.shared_bytes is not None:
        compare("shared memory of a block", recorded["shared_bytes"], cost.shared_bytes)
    if (recorded["step"] is None) != (now["step"] is None):
        return [*found, "there is a main loop in one of them alone"]
    for part in ("step", "around"):
        if now[part] is None:
            continue
        before, after = Counts(**recorded[part]), Counts(**now[part])
        for what in ("barriers", "tensor_waits", "copy_waits", "shared_bytes"):
            compare(f"{what} {part}", getattr(before, what), getattr(after, what))
        pipe, busy = clocks(before, recorded["warps"], cost.card).bound
        _, busy_now = clocks(after, now["warps"], cost.card).bound
        # A different tile takes other clocks for other work: its steps are not compared.
        if recorded["tile"] == now["tile"]:
            compare(f"clocks {part}, bound by {pipe}", busy, busy_now, MARGIN)
    return found
