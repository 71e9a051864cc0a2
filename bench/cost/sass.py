"""Machine code as cuobjdump prints it: instructions, branches, loops.

Only what the count needs is modelled. A branch has the target it names, and a predicated one goes
on behind it as well. So does a call, which may stand for a jump: the compiler leaves loops by it.
The cases of a jump table are the blocks that nothing else leads to. Of a piece of code the path
counts that does the most work in the fewest instructions: what runs time after time, without masks
of a last tile and without slow cases that sit beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Work = tuple[int, ...]
"""What a path is to have the most of, the first figure before the second."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """`name` is the mnemonic with its modifiers."""

    address: int
    name: str
    operands: str
    predicate: str = ""

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @property
    def never(self) -> bool:
        """It takes its turn and does nothing: a filler of the compiler's."""
        return self.predicate == "@!PT"


@dataclass(frozen=True)
class Loop:
    """A natural loop: its blocks by their first addresses, that of its entry among them."""

    header: int
    blocks: frozenset[int]


_LINE = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*([^;]*?)\s*(?:&[^;]*)?;"
)
_FUNCTION = re.compile(r"\s*Function : (\S+)")


def parse(lines: Iterable[str]) -> dict[str, list[Instruction]]:
    """The instructions of each function, by its mangled name."""
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in lines:
        if match := _LINE.match(line):
            address, predicate, name, operands = match.groups()
            code.append(Instruction(int(address, 16), name, operands, (predicate or "").strip()))
        elif match := _FUNCTION.match(line):
            code = functions.setdefault(match[1], [])
    return functions


class Graph:
    """The control flow of one function."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.blocks = _blocks(code)
        starts = sorted(self.blocks)
        follower = dict(pairwise(starts))
        self.after = {
            start: _successors(self.blocks[start][-1], follower.get(start), self.blocks)
            for start in starts
        }
        named = {target for targets in self.after.values() for target in targets}
        cases = tuple(start for start in starts[1:] if start not in named)
        for start in starts:
            if self.blocks[start][-1].opcode in ("BRX", "BRXU"):
                self.after[start] = cases
        self.entry = starts[0]
        self._order = postorder(self.entry, self.after)
        self._before: dict[int, list[int]] = {block: [] for block in self._order}
        for block in self._order:
            for target in self.after[block]:
                self._before[target].append(block)
        self._dominators = self._find_dominators()
        self._loops = self._find_loops()

    def loops(self) -> list[Loop]:
        """Every loop, those with the same entry as one."""
        return list(self._loops.values())

    def path(self, part: Loop | None, work: Callable[[Instruction], Work]) -> list[Instruction]:
        """One pass through a loop, or through the whole function, inner loops once each.

        Of all passes it is the one with the most work, and among those the shortest.
        """
        inside = part.blocks if part else frozenset(self._order)
        start = part.header if part else self.entry
        onward = {block: self._onward(block, inside, start) for block in inside}
        best: dict[int, tuple[Work, tuple[int, ...]]] = {}
        for block in postorder(start, onward):
            code = self.blocks[block]
            own = (*(sum(figures) for figures in zip(*map(work, code), strict=True)), -len(code))
            rest = [best[target] for target in onward[block] if target in best]
            # A pass through a loop is over where the next one begins.
            if start in onward[block] or not rest:
                rest.append(((0,) * len(own), ()))
            most, blocks = max(rest)
            best[block] = tuple(map(sum, zip(own, most, strict=True))), (block, *blocks)
        return [instruction for block in best[start][1] for instruction in self.blocks[block]]

    def _onward(self, block: int, inside: frozenset[int], start: int) -> tuple[int, ...]:
        """Where a pass goes on from a block: not into another round of an inner loop, but from its
        end to whatever comes behind it, though the loop is left elsewhere."""
        found: dict[int, None] = {}
        seen: set[int] = set()
        waiting = [(block, target) for target in self.after[block]]
        while waiting:
            source, target = waiting.pop(0)
            if target not in inside:
                continue
            if target == start or target not in self._dominators[source]:
                found[target] = None
            elif target not in seen:
                seen.add(target)
                loop = self._loops[target].blocks
                waiting += [
                    (last, behind)
                    for last in sorted(loop)
                    for behind in self.after[last]
                    if behind not in loop
                ]
        return tuple(found)

    def code_of(self, loop: Loop) -> list[Instruction]:
        """All instructions of a loop, whichever way it goes."""
        return [i for block in sorted(loop.blocks) for i in self.blocks[block]]

    def _find_dominators(self) -> dict[int, frozenset[int]]:
        """For each block those that every way to it passes, itself among them."""
        everything = frozenset(self._order)
        found = dict.fromkeys(self._order, everything)
        found[self.entry] = frozenset((self.entry,))
        changed = True
        while changed:
            changed = False
            for block in reversed(self._order[:-1]):
                common = frozenset.intersection(*(found[b] for b in self._before[block])) | {block}
                changed |= common != found[block]
                found[block] = common
        return found

    def _find_loops(self) -> dict[int, Loop]:
        by_header: dict[int, set[int]] = {}
        for tail in self._order:
            for header in self.after[tail]:
                if header in self._dominators[tail]:
                    by_header.setdefault(header, {header}).update(self._reaching(tail, header))
        return {header: Loop(header, frozenset(blocks)) for header, blocks in by_header.items()}

    def _reaching(self, tail: int, header: int) -> set[int]:
        """The blocks from which `tail` is reached without passing `header`."""
        found, waiting = {header}, [tail]
        while waiting:
            block = waiting.pop()
            if block not in found:
                found.add(block)
                waiting += self._before[block]
        return found


def postorder(entry: int, after: Mapping[int, Sequence[int]]) -> list[int]:
    """What is reached from the entry, each behind all that it leads to but by a way back."""
    order: list[int] = []
    seen = {entry}
    stack = [(entry, iter(after[entry]))]
    while stack:
        block, targets = stack[-1]
        target = next((t for t in targets if t not in seen), None)
        if target is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(target)
            stack.append((target, iter(after[target])))
    return order


def _blocks(code: Sequence[Instruction]) -> dict[int, list[Instruction]]:
    starts = {code[0].address}
    for i_code, instruction in enumerate(code):
        target = _target(instruction)
        if target is not None:
            starts.add(target)
        if (target is not None or _ends(instruction)) and i_code + 1 < len(code):
            starts.add(code[i_code + 1].address)
    blocks: dict[int, list[Instruction]] = {}
    for instruction in code:
        if instruction.address in starts:
            blocks[instruction.address] = []
            block = blocks[instruction.address]
        block.append(instruction)
    return blocks


def _target(instruction: Instruction) -> int | None:
    if instruction.opcode not in ("BRA", "CALL"):
        return None
    match = re.search(r"0x([0-9a-f]+)\)?$", instruction.operands)
    return int(match[1], 16) if match else None


def _ends(instruction: Instruction) -> bool:
    return instruction.opcode in ("EXIT", "RET", "BRX", "BRXU")


def _successors(
    last: Instruction, follower: int | None, blocks: dict[int, list[Instruction]]
) -> tuple[int, ...]:
    found = []
    target = _target(last)
    if target is not None:
        found.append(target)
    # The condition of a branch is a predicate before it, or its first operand.
    conditional = bool(last.predicate) or (target is not None and len(last.operands.split()) > 1)
    conditional |= last.opcode == "CALL"
    if follower is not None and ((target is None and not _ends(last)) or conditional):
        found.append(follower)
    return tuple(dict.fromkeys(t for t in found if t in blocks))
