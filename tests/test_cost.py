"""The count of machine code: loops and paths of small programs, units of single instructions."""

from __future__ import annotations

import re

import pytest

from bench.cost.analysis import analyse
from bench.cost.pipes import CARDS, clocks, count
from bench.cost.sass import Graph, Instruction, parse


def program(text: str) -> list[Instruction]:
    """The code of lines such as `@P0 BRA 3`, where branches name lines."""
    lines = [line.strip() for line in text.strip().splitlines()]
    listing = ["\t\tFunction : kernel"]
    for i_line, line in enumerate(lines):
        line = re.sub(r"\bto (\d+)$", lambda m: hex(16 * int(m[1])), line)
        listing.append(f"        /*{16 * i_line:04x}*/    {line} ;    /* 0x0 */")
    return parse(listing)["kernel"]


NESTED = """
    MOV R0, R1
    IADD3 R0, R0, R1, RZ
    @P0 BRA to 6
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24
    MUFU.EX2 R0, R0
    @P2 BRA to 3
    STG.E.128 [R0], R1
    @!P1 BRA to 1
    EXIT
    BRA to 9
"""


def test_a_jump_backwards_is_a_loop() -> None:
    graph = Graph(program(NESTED))
    assert sorted(loop.header for loop in graph.loops()) == [16, 48]


def test_the_innermost_loop_with_products_is_the_main_one() -> None:
    found = analyse(program(NESTED))
    assert found.step is not None and found.step.issue == 3
    # The loop around it, of which the inner one is a part.
    assert found.around.issue == 4 and found.around.global_bytes == 512


def test_a_loop_with_a_few_products_of_its_own_is_around() -> None:
    # Every pass through the outer loop prepares the first step of the inner one.
    hgmma = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"
    lines = [hgmma, hgmma, hgmma, "@P2 BRA to 1", "@!P1 BRA to 0", "EXIT"]
    found = analyse(program("\n".join(lines)))
    assert found.step is not None and found.step.issue == 3


MASKED = """
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24
    @P0 BRA to 5
    FSEL R0, R0, R1, P1
    FSEL R0, R0, R1, P1
    FSEL R0, R0, R1, P1
    @P1 BRA to 7
    LDGSTS.E.BYPASS.128 [R0], [R2.64]
    @P2 BRA to 9
    BAR.SYNC.DEFER_BLOCKING 0x0
    @P3 BRA to 0
    EXIT
"""


def test_a_pass_skips_what_does_no_work() -> None:
    code = program(MASKED)
    graph = Graph(code)
    (loop,) = graph.loops()
    found = analyse(code)
    assert found.step is not None
    # The copy is work, the masks are not; the barrier counts though it may be jumped over.
    assert found.step.issue == 6 and found.step.global_bytes == 512 and found.step.alu == 0
    assert found.barriers == 1
    assert len(graph.code_of(loop)) == 10


# The loop is left at its top, and comes back by a jump without a condition.
LEFT_AT_THE_TOP = """
    MOV R0, R1
    @P0 BRA to 4
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24
    BRA to 1
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24
    @P1 BRA to 4
    EXIT
"""


def test_a_pass_goes_on_behind_a_loop_that_is_left_at_its_top() -> None:
    found = analyse(program(LEFT_AT_THE_TOP))
    assert found.step is not None and found.step.shapes == {"HGMMA.64x64x16.F32.BF16": 2}
    # The first loop once, beside the second one, which is the main one.
    assert found.around.shapes == {"HGMMA.64x64x16.F32.BF16": 1}
    assert found.around.issue == 5


def test_a_call_may_be_a_jump_out_of_a_loop() -> None:
    left_by_a_call = LEFT_AT_THE_TOP.replace("@P0 BRA to 4", "@P0 CALL.REL.NOINC to 4")
    assert analyse(program(left_by_a_call)) == analyse(program(LEFT_AT_THE_TOP))


def test_code_without_products_or_much_memory_in_a_loop_is_taken_whole() -> None:
    found = analyse(
        program("LDG.E.128 R0, [R2]\nIADD3 R1, R1, R2, RZ\n@P0 BRA to 1\nSTG.E.128 [R2], R0\nEXIT")
    )
    assert found.step is None
    assert found.around.issue == 5 and found.around.global_bytes == 1024


# (instruction, unit, its shared bytes, of global memory, multiply-adds of a warp)
SINGLE = [
    ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT", "wgmma", 1024, 0, 16384),
    ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "wgmma", 1536, 0, 32768),
    ("HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR8].tnspB, R56", "wgmma", 512, 0, 16384),
    ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "mma", 0, 0, 2048),
    ("LDSM.16.MT88.4 R4, [R8]", "lsu", 512, 0, 0),
    ("LDSM.16.M88 R4, [R8]", "lsu", 128, 0, 0),
    ("LDS.U8 R4, [R8]", "lsu", 128, 0, 0),
    ("LDS.64 R4, [R8]", "lsu", 256, 0, 0),
    ("LDGSTS.E.BYPASS.128 [R37], desc[UR24][R26.64], !P0", "lsu", 512, 512, 0),
    ("LDG.E.U16.CONSTANT R0, [R2]", "lsu", 0, 64, 0),
    ("@!PT LDS RZ, [RZ]", "lsu", 0, 0, 0),
    ("SHFL.BFLY PT, R89, R12, 0x2, 0x1f", "shuffle", 0, 0, 0),
    ("MUFU.EX2 R0, R0", "mufu", 0, 0, 0),
    ("I2F.U32.RP R0, R0", "mufu", 0, 0, 0),
    ("I2FP.F32.S32 R0, R0", "alu", 0, 0, 0),
    ("FMNMX R0, R1, R2, !PT", "alu", 0, 0, 0),
    ("F2FP.BF16.F32.PACK_AB R0, R1, R2", "alu", 0, 0, 0),
    ("HFMA2.MMA R0, R1, R2, R3", "fma", 0, 0, 0),
    ("FFMA R0, R1, R2, R3", "fma", 0, 0, 0),
    ("IMAD.MOV.U32 R0, RZ, RZ, R1", "fma_heavy", 0, 0, 0),
    ("UIADD3 UR4, UR4, 0x1, URZ", "uniform", 0, 0, 0),
]


@pytest.mark.parametrize("line, unit, shared, moved, products", SINGLE, ids=lambda value: None)
def test_instructions(line: str, unit: str, shared: int, moved: int, products: int) -> None:
    counts = count(program(line))
    assert getattr(counts, unit) == (products or 1)
    assert (counts.shared_bytes, counts.global_bytes) == (shared, moved)
    assert counts.mma + counts.wgmma == products and counts.issue == 1


def test_clocks_of_an_attention_tile() -> None:
    """128 queries by 64 keys of 64, two warp groups: as much as the matrix units alone would take
    goes into exponentials, operands from shared memory, and turns."""
    lines = ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"] * 4
    lines += ["HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR8].tnspB, R56"] * 4
    lines += ["LDGSTS.E.BYPASS.128 [R37], [R26.64]"] * 4
    lines += ["MUFU.EX2 R0, R0"] * 34
    lines += ["FFMA R0, R0, R1, R2"] * 106 + ["IMAD.MOV.U32 R0, RZ, RZ, R1"] * 14
    lines += ["FMNMX R0, R1, R2, !PT"] * 59
    lines += ["SHFL.BFLY PT, R0, R1, 0x2, 0x1f"] * 8
    found = clocks(count(program("\n".join(lines))), 8, CARDS[90])
    assert (found.tensor, found.mufu, found.shared) == (512, 544, 512)
    assert (found.fma, found.alu, found.shuffle) == (240, 236, 64)
    assert found.bound == ("mufu", 544) and found.in_turn == 1056
