"""Runs the PTX of small kernels: one block, each instruction as the PTX ISA describes it.

It knows what nvcc makes of the functions in csrc/ptx.cuh, and raises for anything else. Registers
are Python integers, the bits that they hold. Layouts over the lanes of a warp are written out from
the ISA's tables, apart from the emulation in tests/cuda_host/.
"""

from __future__ import annotations

import operator
import re
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import torch

WARP = 32
# Where operands lie. Shared memory begins at 0.
IN, OUT = 1 << 20, 2 << 20


# ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": groupID = lane >> 2,
# threadID_in_group = lane % 4. Row and column of an element of a lane.
def a_element(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    row = group if i in (0, 1, 4, 5) else group + 8
    column = thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8
    return row, column


def b_element(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    row = thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8
    return row, group


def c_element(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def matrix_element(lane: int, trans: bool) -> list[tuple[int, int]]:
    """ISA, ldmatrix: row and column of the two elements that a lane has of each matrix."""
    pairs = [(lane // 4, 2 * (lane % 4) + i) for i in range(2)]
    return [(column, row) for row, column in pairs] if trans else pairs


class PtxError(Exception):
    """What the ISA leaves undefined, or this interpreter does not know."""


@dataclass
class Instruction:
    text: str
    opcode: str
    operands: list[str]
    guard: str | None


@dataclass
class Kernel:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(ptx: str) -> dict[str, Kernel]:
    """The entries of a PTX file, by name."""
    kernels = {}
    for name, body in re.findall(r"\.entry (\w+)\(.*?\)\s*\{(.*?)\n\}", ptx, re.DOTALL):
        kernel = kernels[name] = Kernel()
        for statement in re.split(r"[;\n]\s*", re.sub(r"//.*", "", body)):
            text = " ".join(statement.split())
            if text.endswith(":"):
                kernel.labels[text[:-1]] = len(kernel.instructions)
            elif text and not text.startswith(".reg"):
                guard, opcode, operands = re.fullmatch(
                    r"(?:@(!?%p\d+) )?([a-z][\w.]*)\s*(.*)", text
                ).groups()  # type: ignore[union-attr]
                # Braces and brackets hold a vector or an address: the names inside are in order.
                split = re.findall(r"[\w%$.+-]+", operands)
                kernel.instructions.append(Instruction(text, opcode, split, guard))
    return kernels


def to_float(bits: int) -> float:
    return struct.unpack("f", struct.pack("I", bits))[0]


def to_bits(x: float) -> int:
    return int(torch.tensor(x, dtype=torch.float64).float().view(torch.int32)) % 2**32


def flush(x: float) -> float:
    return x * 0.0 if abs(x) < 2.0**-126 else x


def widen(bits: int, dtype: torch.dtype) -> float:
    return float(torch.tensor(bits - (bits >> 15 << 16), dtype=torch.int16).view(dtype))


def narrow(bits: int, dtype: torch.dtype) -> int:
    x = to_float(bits)
    if x != x:
        return 0x7FFF
    return int(torch.tensor(x, dtype=torch.float32).to(dtype).view(torch.int16)) % 2**16


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


# What a thread waits for: the operation, who takes part, and what it brings. It is sent the result.
@dataclass
class Meeting:
    operation: str
    lanes: int
    brought: tuple[int, ...]


@dataclass
class Arrival:
    barrier: int
    threads: int
    waits: bool


Barriers = dict[int, list[tuple[int, Arrival]]]
Running = Generator[Meeting | Arrival, list[int], None]


class Block:
    """One block of one kernel, to be run once. `executed` is the instructions that it came to."""

    def __init__(self, kernel: Kernel, memory: dict[int, bytearray], threads: int) -> None:
        self.kernel = kernel
        self.threads = threads
        self.memory = memory
        self.shared = bytearray(b"\xff" * 16 * threads)
        self.executed: set[str] = set()

    def run(self, last_first: bool = False) -> None:
        """Threads run as far as they come, one after the other, from the first on or the last."""
        order = range(self.threads)[:: -1 if last_first else 1]
        running = {i: Thread(self, i).run() for i in order}
        sent: dict[int, list[int] | None] = dict.fromkeys(order)
        meetings: dict[tuple[object, ...], dict[int, Meeting]] = {}
        barriers: Barriers = {}
        while sent:
            i = next(iter(sent))
            result = sent.pop(i)
            try:
                reached = running[i].send(result)  # type: ignore[arg-type]
                while isinstance(reached, Arrival):
                    for j in arrive(barriers, i, reached):
                        sent[j] = []
                    if reached.waits:
                        break
                    reached = running[i].send([])
            except StopIteration:
                del running[i]
                continue
            if isinstance(reached, Arrival):
                continue
            key = (i // WARP, reached.operation, reached.lanes)
            here = meetings.setdefault(key, {})
            here[i % WARP] = reached
            if not reached.lanes >> i % WARP & 1:
                raise PtxError(f"lane {i % WARP} is not among those it names: {reached}")
            if len(here) == reached.lanes.bit_count():
                del meetings[key]
                brought = {lane: meeting.brought for lane, meeting in here.items()}
                for lane, result in perform(reached.operation, brought).items():
                    sent[i // WARP * WARP + lane] = result
        if running:
            raise PtxError(f"threads {sorted(running)} wait for ever")

    def bytes_at(self, space: str, address: int, size: int) -> tuple[bytearray, int]:
        if address % size:
            raise PtxError(f"{address:#x} is not aligned to {size}")
        if space == "shared":
            memory, offset = self.shared, address
        else:
            base = IN if address < OUT else OUT
            memory, offset = self.memory[base], address - base
        if not 0 <= offset <= len(memory) - size:
            raise PtxError(f"{size} bytes at {address:#x} of {space} memory are nobody's")
        return memory, offset


def arrive(barriers: Barriers, thread: int, arrival: Arrival) -> list[int]:
    """Which threads go on because this one has come."""
    here = barriers.setdefault(arrival.barrier, [])
    here.append((thread, arrival))
    if {other.threads for _, other in here} != {arrival.threads}:
        raise PtxError(f"barrier {arrival.barrier} is told different counts")
    if len(here) < arrival.threads:
        return []
    del barriers[arrival.barrier]
    return [i for i, other in here if other.waits]


def perform(operation: str, brought: dict[int, tuple[int, ...]]) -> dict[int, list[int]]:
    """What each lane of a warp is given, from what each brings."""
    kind, *modifiers = operation.split(".")
    if kind == "bar":
        return {lane: [] for lane in brought}
    if kind == "vote":
        ballot = sum((predicate & 1) << lane for lane, (predicate,) in brought.items())
        return {lane: [ballot] for lane in brought}
    if kind == "shfl":
        return {lane: shuffled(modifiers[1], lane, brought) for lane in brought}
    if kind == "ldmatrix":
        count = int(modifiers[3][1:])
        rows = [list(brought[i]) for i in range(8 * count)]
        elements = {lane: matrix_element(lane, "trans" in modifiers) for lane in brought}
        return {
            lane: [
                sum(rows[8 * m + row][column] << 16 * i for i, (row, column) in enumerate(pair))
                for m in range(count)
            ]
            for lane, pair in elements.items()
        }
    assert kind == "mma" and modifiers[:5] == ["sync", "aligned", "m16n8k16", "row", "col"]
    assert modifiers[5] == modifiers[8] == "f32" and modifiers[6] == modifiers[7]
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[modifiers[6]]
    a, b = torch.zeros(16, 16, dtype=torch.float64), torch.zeros(16, 8, dtype=torch.float64)
    c = torch.zeros(16, 8, dtype=torch.float64)
    for lane, words in brought.items():
        halves = [word >> shift & 0xFFFF for word in words[:6] for shift in (0, 16)]
        for i in range(8):
            a[a_element(lane, i)] = widen(halves[i], dtype)
        for i in range(4):
            b[b_element(lane, i)] = widen(halves[8 + i], dtype)
            c[c_element(lane, i)] = to_float(words[6 + i])
    d = a @ b + c
    return {lane: [to_bits(float(d[c_element(lane, i)])) for i in range(4)] for lane in brought}


def shuffled(mode: str, lane: int, brought: dict[int, tuple[int, ...]]) -> list[int]:
    _, b, c = brought[lane]
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    lowest, highest = lane & segment, (lane & segment) | (clamp & ~segment)
    if mode == "up":
        source, within = lane - b, lane - b >= highest
    else:
        source = {"down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
        within = source <= highest
    source = source if within else lane
    if source not in brought:
        raise PtxError(f"shfl reads lane {source}, which takes no part")
    return [brought[source][0], int(within)]


ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
}
COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


class Thread:
    def __init__(self, block: Block, index: int) -> None:
        self.block = block
        self.index = index
        self.registers = {"%tid.x": index}
        self.uncommitted: list[tuple[int, bytes]] = []
        self.groups: list[list[tuple[int, bytes]]] = []

    def value(self, operand: str) -> int:
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("0f"):
            return int(operand[2:], 16)
        if operand.lstrip("-").isdigit():
            return int(operand)
        if operand.endswith("dynamic_shared_memoryE"):
            return 0
        if re.fullmatch(r"[%\w.]+\+\d+", operand):
            base, offset = operand.split("+")
            return self.value(base) + int(offset)
        raise PtxError(f"no such operand: {operand}")

    def number(self, operand: str, kind: str) -> int | float:
        value = self.value(operand)
        if kind == "f32":
            return to_float(value)
        size = int(kind[1:])
        value %= 1 << size
        return signed(value, size) if kind[0] == "s" else value

    def run(self) -> Running:
        kernel, at = self.block.kernel, 0
        while True:
            instruction = kernel.instructions[at]
            at += 1
            if instruction.guard is not None:
                wanted = not instruction.guard.startswith("!")
                if bool(self.registers[instruction.guard.lstrip("!")]) != wanted:
                    continue
            self.block.executed.add(instruction.text)
            if instruction.opcode == "ret":
                return
            if instruction.opcode.split(".")[0] == "bra":
                at = kernel.labels[instruction.operands[0]]
                continue
            try:
                yield from self.execute(instruction)
            except (PtxError, KeyError, ValueError) as error:
                raise PtxError(f"{instruction.text}: {error!r}") from error

    def execute(self, instruction: Instruction) -> Running:
        opcode, operands = instruction.opcode, instruction.operands
        kind, *modifiers = opcode.split(".")
        registers, value = self.registers, self.value
        if kind == "mov" or opcode == "cvta.to.global.u64":
            registers[operands[0]] = value(operands[1])
        elif opcode == "ld.param.u64":
            registers[operands[0]] = OUT if operands[1].endswith("+8") else IN
        elif kind in ("ld", "st"):
            self.access(kind, modifiers, operands)
        elif kind in ARITHMETIC:
            numbers = [self.number(operand, modifiers[-1]) for operand in operands[1:]]
            size = int(modifiers[-1][1:])
            registers[operands[0]] = ARITHMETIC[kind](*numbers) % (1 << size)  # type: ignore[arg-type]
        elif kind == "mul":
            a, b = (self.number(operand, modifiers[-1]) for operand in operands[1:])
            size, product = int(modifiers[-1][1:]), int(a) * int(b)
            if modifiers[0] == "wide":
                size *= 2
            registers[operands[0]] = (product >> size if modifiers[0] == "hi" else product) % (
                1 << size
            )
        elif kind == "setp":
            a, b = (self.number(operand, modifiers[-1]) for operand in operands[1:])
            registers[operands[0]] = int(COMPARISONS[modifiers[0]](a, b))
        elif kind == "selp":
            registers[operands[0]] = value(operands[1 if value(operands[3]) else 2])
        elif kind == "cvt":
            registers[operands[0]] = self.converted(".".join(modifiers), operands[1:])
        elif kind in ("ex2", "rcp", "rsqrt"):
            registers[operands[0]] = approximated(opcode, to_float(value(operands[1])))
        elif kind == "atom":
            memory, at = self.block.bytes_at(modifiers[0], value(operands[1]), 4)
            assert modifiers[1:] == ["add", "u32"], opcode
            (before,) = struct.unpack_from("I", memory, at)
            struct.pack_into("I", memory, at, (before + value(operands[2])) % 2**32)
            registers[operands[0]] = before
        elif kind == "cp":
            self.copy(modifiers, operands)
        elif opcode in ("bar.sync", "bar.arrive"):
            barrier, *threads = map(value, operands)
            if not 0 <= barrier < 16 or any(n % WARP for n in threads):
                raise PtxError("barriers are 0 to 15, and count whole warps")
            yield Arrival(barrier, *(threads or [self.block.threads]), waits=opcode == "bar.sync")
        elif opcode == "bar.warp.sync":
            yield Meeting(opcode, value(operands[0]) % 2**32, ())
        elif kind == "vote":
            result = yield Meeting(opcode, value(operands[2]) % 2**32, (value(operands[1]),))
            (registers[operands[0]],) = result
        elif kind == "shfl":
            target, predicate, *brought, lanes = operands
            result = yield Meeting(opcode, value(lanes) % 2**32, tuple(map(value, brought)))
            registers[target], registers[predicate] = result
        elif kind == "ldmatrix":
            *targets, address = operands
            row: tuple[int, ...] = ()
            if self.index % WARP < 8 * len(targets):
                memory, at = self.block.bytes_at("shared", value(address), 16)
                row = struct.unpack_from("8H", memory, at)
            result = yield Meeting(opcode, 2**WARP - 1, row)
            registers.update(zip(targets, result, strict=True))
        elif kind == "mma":
            result = yield Meeting(opcode, 2**WARP - 1, tuple(map(value, operands[4:])))
            registers.update(zip(operands[:4], result, strict=True))
        elif kind not in ("membar", "fence"):
            raise PtxError("unknown instruction")

    def access(self, kind: str, modifiers: list[str], operands: list[str]) -> None:
        vector = next((int(m[1]) for m in modifiers if m in ("v2", "v4")), 1)
        size = int(modifiers[-1][1:]) // 8
        names, address = (operands[:-1], operands[-1])
        if kind == "st":
            address, *names = operands
        assert len(names) == vector, operands
        memory, at = self.block.bytes_at(modifiers[0], self.value(address), size * vector)
        form = f"{vector}{'HI'[size == 4]}"
        if kind == "ld":
            self.registers.update(zip(names, struct.unpack_from(form, memory, at), strict=True))
        else:
            words = [self.value(name) % (1 << 8 * size) for name in names]
            struct.pack_into(form, memory, at, *words)

    def converted(self, kinds: str, operands: list[str]) -> int:
        bits = [self.value(operand) for operand in operands]
        if kinds == "f32.f16":
            return to_bits(widen(bits[0], torch.float16))
        if kinds in ("rn.f16x2.f32", "rn.bf16x2.f32"):
            # ISA: the first source is converted into the upper half.
            dtype = torch.bfloat16 if "b" in kinds else torch.float16
            return narrow(bits[0], dtype) << 16 | narrow(bits[1], dtype)
        if kinds == "rn.f32.u32":
            return to_bits(float(bits[0]))
        if re.fullmatch(r"u(16|32|64)\.u(16|32|64)", kinds):
            return bits[0] % (1 << min(int(size) for size in re.findall(r"\d+", kinds)))
        raise PtxError("unknown conversion")

    def copy(self, modifiers: list[str], operands: list[str]) -> None:
        block = self.block
        if modifiers[1] == "commit_group":
            self.groups.append(self.uncommitted)
            self.uncommitted = []
        elif modifiers[1] == "wait_group":
            newest = self.value(operands[0])
            while len(self.groups) > newest:
                for target, data in self.groups.pop(0):
                    block.shared[target : target + len(data)] = data
        else:
            assert modifiers[:1] == ["async"] and modifiers[2:] == ["shared", "global"]
            target, source, size, source_size = map(self.value, operands)
            if size not in ((16,) if modifiers[1] == "cg" else (4, 8, 16)) or source_size > size:
                raise PtxError(f"a copy of {size} bytes, {source_size} of them from memory")
            block.bytes_at("shared", target, size)
            memory, at = block.bytes_at("global", source, size)
            data = bytes(memory[at : at + source_size]).ljust(size, b"\0")
            self.uncommitted.append((target, data))


def approximated(opcode: str, x: float) -> int:
    """Exact, where hardware may be off by a unit: compare where results are powers of two."""
    ftz = "ftz" in opcode
    x = flush(x) if ftz else x
    if x != x:
        return 0x7FFFFFFF
    if opcode.startswith("ex2"):
        y = 2.0**x if x < 1000 else float("inf")
    elif opcode.startswith("rcp"):
        y = 1.0 / x if x else float("inf") * (1.0 if str(x) == "0.0" else -1.0)
    else:
        y = x**-0.5 if x > 0 else float("inf")
    return to_bits(flush(y) if ftz else y)
