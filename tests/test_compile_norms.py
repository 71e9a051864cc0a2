"""Every launch configuration of the LayerNorm kernels, compiled for cards that are not there."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from triton_compile import ARCHS, CompileCase, CompileReport, compile_cases, problems

from encoder_fast.kernels.row_norm import ACCESS_BYTES, ROW_TILES, row_tile

ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}

# Widths inside a rung that many encoders have. Rows of 312 are aligned to 8 elements, not to 16.
COMMON_WIDTHS = (312, 768)


def layer_norm_case(
    kernel: str, signature: dict[str, str], N: int, dtype: str, vector_dtype: str, arch: int
) -> CompileCase:
    tile = row_tile(N)
    # Strides bear no `:16`, for what the kernel needs to know of them it is told as ROW_ALIGN.
    return CompileCase(
        name=f"{kernel}-N{N}-{dtype}-{vector_dtype}-sm_{arch}",
        kernel=f"encoder_fast.kernels.{kernel}:{kernel}_kernel",
        signature=signature
        | {"p_weight": f"*{vector_dtype}:16", "p_bias": f"*{vector_dtype}:16"}
        | {"p_out": f"*{dtype}:16", "eps": "fp32"},
        constexprs={
            "N": N,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.block_n(ITEMSIZE[dtype]),
            "ROW_ALIGN": ACCESS_BYTES // ITEMSIZE[dtype],
        },
        num_warps=tile.num_warps,
        # There is no loop to pipeline; 3 is what Triton passes when the launcher says nothing.
        num_stages=3,
        arch=arch,
    )


def add_layer_norm_case(N: int, dtype: str, vector_dtype: str, arch: int) -> CompileCase:
    signature = {f"p_{name}": f"*{dtype}:16" for name in ("x", "residual")}
    signature |= {f"stride_{name}_row": "i32" for name in ("x", "residual")}
    signature |= {"p_x_bias": f"*{vector_dtype}:16", "p_sum": f"*{dtype}:16", "M": "i32"}
    return layer_norm_case("add_layer_norm", signature, N, dtype, vector_dtype, arch)


def embed_layer_norm_case(N: int, dtype: str, vector_dtype: str, arch: int) -> CompileCase:
    signature = {f"p_{name}_ids": "*i64:16" for name in ("input", "position", "token_type")}
    for name in ("word", "position", "token_type"):
        signature |= {f"p_{name}": f"*{dtype}:16", f"stride_{name}_row": "i32", f"n_{name}": "i32"}
    signature["total"] = "i32"
    return layer_norm_case("embed_layer_norm", signature, N, dtype, vector_dtype, arch)


def cases_for(arch: int) -> list[CompileCase]:
    """Each tile at the largest width that it serves, with the operands that cost most registers."""
    widest = [limit for limit, _ in ROW_TILES]
    cases = [
        case_of(N, dtype, "fp32", arch)
        for case_of in (add_layer_norm_case, embed_layer_norm_case)
        for N in widest
        for dtype in ("fp16", "fp32")
    ]
    # fp16 and bf16 differ in the instruction that converts, so they share the architectures.
    half = "fp16" if arch in (80, 90) else "bf16"
    cases += [add_layer_norm_case(N, half, half, arch) for N in COMMON_WIDTHS]
    cases += [embed_layer_norm_case(N, half, half, arch) for N in COMMON_WIDTHS]
    return cases


UNALIGNED = replace(
    add_layer_norm_case(768, "fp16", "fp16", 90),
    name="unaligned",
    constexprs={"N": 768, "BLOCK_M": 4, "BLOCK_N": 256, "ROW_ALIGN": 1},
)


def shortcomings(case: CompileCase, report: CompileReport) -> list[str]:
    found = problems(report, case.arch)
    if report.error:
        return found

    # Of an access only the number of bits in all counts, not into how many registers it goes.
    accesses = re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.b(\d+) ", report.ptx)
    narrow = [a for a in accesses if int(a[1] or 1) * int(a[2]) < 8 * ACCESS_BYTES]
    # An id is a number by itself; three are read.
    ids = 3 if case.kernel.endswith("embed_layer_norm_kernel") else 0
    if not accesses or len(narrow) != ids:
        found.append(f"{len(narrow)} of {len(accesses)} accesses are narrower than 16 bytes")
    if case.constexprs["N"] <= 1024 and (report.shared_bytes or "bar.sync" in report.ptx):
        found.append("a row leaves its warp")
    half = case.signature["p_out"] != "*fp32:16"
    if half and case.constexprs["N"] <= 1024 and report.registers > 64:
        found.append(f"uses {report.registers} registers, 64 leave room for 32 warps")
    return found


@pytest.fixture(scope="module")
def reports() -> dict[str, CompileReport]:
    """Of all architectures together: starting a process costs as much as ten cases."""
    return compile_cases([UNALIGNED, *(case for arch in ARCHS for case in cases_for(arch))])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids="sm_{}".format)
def test_shipped_configurations_fit_the_card(reports, arch):
    wrong = [
        f"{case.name}: {line}"
        for case in cases_for(arch)
        for line in shortcomings(case, reports[case.name])
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_a_narrow_access_would_be_noticed(reports):
    (line,) = shortcomings(UNALIGNED, reports[UNALIGNED.name])
    assert "narrower than 16 bytes" in line
