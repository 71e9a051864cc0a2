"""Which unit of a multiprocessor runs an instruction, how long, and what that makes in clocks.

A multiprocessor has four parts. Each issues one instruction of a warp a clock, to its own units or
to those that the four share. Rates are NVIDIA's, by the tables of arithmetic instructions in the
CUDA C++ Programming Guide and by the white papers; docs/kernels/cost.md lists them. Bank conflicts,
latencies and caches are not modelled: clocks by pipe are what a kernel takes at least.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from math import prod

from bench.cost.sass import Instruction, Work

PARTS = 4
LANES = 32
SYSTEM_SHARED = 1024


@dataclass(frozen=True)
class Card:
    """What one architecture does in a clock, for the card that stands for it.

    Attributes:
        tensor: 16-bit multiply-adds a clock of a multiprocessor at the rated peak.
        mma_share: of them what mma.sync reaches.
        fp32: lanes of a part that multiply and add float32; `integer` of them integers too.
        copy: bytes a second that a copy moves, reads and writes together.
    """

    name: str
    arch: int
    multiprocessors: int
    clock: float
    tensor: int
    mma_share: float
    fp32: int
    copy: float
    shared_bytes: int
    integer: int = 16
    alu: int = 16
    special: int = 4
    shared: int = 128
    shuffle: int = 32
    registers: int = 64 * 1024
    warps: int = 64


CARDS = {
    # 312, 989 and 2,250 TFLOP/s in 16 bits without sparsity; the clock is the one of that figure.
    80: Card("A100 80GB", 80, 108, 1.41e9, 1024, 1.0, 16, 1.75e12, 164 * 1024),
    90: Card("H100 SXM", 90, 132, 1.83e9, 2048, 0.62, 32, 3.0e12, 228 * 1024),
    100: Card("B200", 100, 148, 1.85e9, 4096, 0.31, 32, 7.0e12, 228 * 1024),
}

# In all tables in this order.
PIPES = ("tensor", "mufu", "fma", "alu", "shared", "shuffle", "issue")


@dataclass
class Counts:
    """What the warps of a block run together in one pass of a piece of code.

    Figures are instructions of one warp, but for multiply-adds (mma, wgmma) and bytes, which are
    its share. Products of tcgen05 are instructions of the block: their size is in no mnemonic.
    """

    mma: int = 0
    wgmma: int = 0
    tcgen05: int = 0
    mufu: int = 0
    fma: int = 0
    fma_heavy: int = 0
    alu: int = 0
    lsu: int = 0
    shuffle: int = 0
    uniform: int = 0
    issue: int = 0
    barriers: int = 0
    tensor_waits: int = 0
    copy_waits: int = 0
    shared_bytes: int = 0
    global_bytes: int = 0
    shapes: dict[str, int] = field(default_factory=dict)

    @property
    def products(self) -> int:
        """To compare one piece of a kernel with another."""
        return self.mma + self.wgmma + self.tcgen05

    def __sub__(self, other: Counts) -> Counts:
        shapes = {k: n - other.shapes.get(k, 0) for k, n in self.shapes.items()}
        rest = {
            f.name: getattr(self, f.name) - getattr(other, f.name)
            for f in fields(self)
            if f.name != "shapes"
        }
        return Counts(**rest, shapes={k: n for k, n in shapes.items() if n})


@dataclass(frozen=True)
class Clocks:
    """Clocks that each pipe of a multiprocessor is busy for one pass of a block."""

    tensor: float
    mufu: float
    fma: float
    alu: float
    shared: float
    shuffle: float
    issue: float

    def scaled(self, factor: float) -> Clocks:
        return Clocks(**{name: value * factor for name, value in asdict(self).items()})

    def __add__(self, other: Clocks) -> Clocks:
        return Clocks(**{p: getattr(self, p) + getattr(other, p) for p in PIPES})

    @property
    def bound(self) -> tuple[str, float]:
        """The pipe that is busy longest: all others hide behind it at best."""
        pipe = max(PIPES, key=lambda name: float(getattr(self, name)))
        return pipe, float(getattr(self, pipe))

    @property
    def in_turn(self) -> float:
        """Clocks if nothing else runs while the tensor cores do."""
        return self.tensor + max(float(getattr(self, p)) for p in PIPES if p != "tensor")


# The first pattern that an instruction's name begins with decides.
_UNITS = (
    ("tensor", r"HMMA|HGMMA|IMMA|IGMMA|QGMMA|DMMA|UT\w*MMA"),
    ("mufu", r"MUFU|F2I|I2F(?!P)|F2F(?!P)|FRND|POPC|FLO|BREV"),
    ("shuffle", r"SHFL|REDUX"),
    ("lsu", r"LD[GSLTC]|LD\b|LDSM|ST[GSLT]|ST\b|STSM|ATOM|RED\b|LDGSTS|UBLKCP|UTMA|CCTL"),
    ("control", r"BRA|BRX|BSSY|BSYNC|BREAK|BAR|CALL|RET|EXIT|WARPSYNC|WARPGROUP|MEMBAR|FENCE"),
    ("control", r"DEPBAR|LDGDEPBAR|NOP|YIELD|NANOSLEEP|ERRBAR|VOTE|ENDCOLLECTIVE|SYNCS|ELECT"),
    ("control", r"S2R|S2UR|CS2R|R2UR|ACQBULK|UCGABAR|USETMAXREG|B2R"),
    ("uniform", r"U[A-Z]"),
    ("fma_heavy", r"IMAD|IDP"),
    ("fma", r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|HFMA2_MMA|FSWZADD"),
    # Compares, selects, logic, shifts, integer sums, conversions of pairs.
    ("alu", r"[A-Z]"),
)
_PATTERNS = tuple((unit, re.compile(pattern)) for unit, pattern in _UNITS)


def unit_of(instruction: Instruction) -> str:
    return next(unit for unit, pattern in _PATTERNS if pattern.match(instruction.name))


def work_of(instruction: Instruction) -> Work:
    """What a kernel exists for: products, bytes to and from memory."""
    products = tensor_fma(instruction) or int(unit_of(instruction) == "tensor")
    return products, global_bytes(instruction)


def tensor_fma(instruction: Instruction) -> int:
    """Multiply-adds of a warp: of a warp group's product a quarter."""
    if match := re.match(r"HMMA\.(16)(8)(16|8)\.", instruction.name):
        return prod(map(int, match.groups()))
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", instruction.name):
        return prod(map(int, match.groups())) // PARTS
    return 0


def access_bytes(instruction: Instruction) -> int:
    """Bytes that all lanes of a warp read or write together."""
    modifiers = instruction.name.split(".")[1:]
    if instruction.opcode == "LDSM":
        matrices = int(modifiers[-1]) if modifiers[-1].isdigit() else 1
        return matrices * 8 * 8 * 2
    for size in ("128", "64"):
        if size in modifiers:
            return int(size) // 8 * LANES
    narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2}
    return next((narrow[m] for m in modifiers if m in narrow), 4) * LANES


def global_bytes(instruction: Instruction) -> int:
    if instruction.opcode in ("LDG", "STG", "LDGSTS") and not instruction.never:
        return access_bytes(instruction)
    return 0


def shared_bytes(instruction: Instruction) -> int:
    """Bytes through the banks: an access takes one clock at the least, that is 128 bytes.

    A warp group's product reads what it does not have in registers: A is of 64 rows, B of N
    columns, each 16 deep in 16 bits, and B is read once for all four warps.
    """
    if instruction.never:
        return 0
    if instruction.opcode in ("LDS", "STS", "LDSM", "STSM", "LDGSTS", "ATOMS"):
        return max(128, access_bytes(instruction))
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", instruction.name):
        rows, columns, depth = map(int, match.groups())
        # Behind the result comes A in registers, or one descriptor for both A and B.
        a_is_shared = re.match(r"R\d+, gdesc", instruction.operands) is not None
        return (rows * a_is_shared + columns) * depth * 2 // PARTS
    return 0


def count(code: Iterable[Instruction]) -> Counts:
    """What a warp does in a pass through some code."""
    counts = Counts()
    for instruction in code:
        unit, name = unit_of(instruction), instruction.name
        counts.issue += 1
        if unit == "tensor":
            amount = tensor_fma(instruction)
            if instruction.opcode == "HMMA":
                counts.mma += amount
            elif instruction.opcode == "HGMMA":
                counts.wgmma += amount
            else:
                counts.tcgen05 += 1
            counts.shapes[name] = counts.shapes.get(name, 0) + 1
        elif unit != "control":
            setattr(counts, unit, getattr(counts, unit) + 1)
        counts.barriers += instruction.opcode == "BAR"
        counts.tensor_waits += name.startswith("WARPGROUP.DEPBAR")
        counts.copy_waits += instruction.opcode in ("DEPBAR", "SYNCS")
        counts.shared_bytes += shared_bytes(instruction)
        counts.global_bytes += global_bytes(instruction)
    return counts


def clocks(counts: Counts, warps: int, card: Card, tcgen05_fma: float = 0) -> Clocks:
    """Clocks by pipe for a pass of a block of `warps` warps.

    Args:
        tcgen05_fma: multiply-adds of all such instructions together.
    """
    # Instructions of one warp on one part, at a rate in lanes a clock.
    share = warps / PARTS
    integer = counts.fma_heavy * LANES / card.integer
    return Clocks(
        tensor=((counts.wgmma + counts.mma / card.mma_share) * warps + tcgen05_fma) / card.tensor,
        mufu=share * counts.mufu * LANES / card.special,
        fma=share * max(integer, (counts.fma + counts.fma_heavy) * LANES / card.fp32),
        alu=share * counts.alu * LANES / card.alu,
        shared=warps * counts.shared_bytes / card.shared,
        shuffle=warps * counts.shuffle * LANES / card.shuffle,
        issue=share * counts.issue,
    )


def resident_blocks(registers: int, warps: int, shared_bytes: int, card: Card) -> int:
    """How many blocks a multiprocessor holds together."""
    by_registers = card.registers // (-(-registers // 8) * 8 * LANES * warps)
    by_shared = card.shared_bytes // (shared_bytes + SYSTEM_SHARED)
    return min(by_registers, by_shared, card.warps // warps, 32)
