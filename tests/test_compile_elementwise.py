"""The launch configurations of the elementwise kernels, compiled for cards that are not there."""

from __future__ import annotations

import re

import pytest
from triton_compile import ARCHS, CompileCase, CompileReport, compile_cases, problems

from encoder_fast.kernels import gated
from encoder_fast.kernels.rotary import head_tile

HEAD_DIMS = (16, 32, 64, 96, 128)

# ModernBERT-base and -large; the second is no multiple of the tile.
GATED_WIDTHS = (1152, 2624)


def rotary_case(head_dim: int, dtype: str, arch: int) -> CompileCase:
    tile = head_tile(head_dim)
    return CompileCase(
        name=f"rotary-D{head_dim}-{dtype}-sm_{arch}",
        kernel="encoder_fast.kernels.rotary:rotary_kernel",
        signature={
            "p_qkv": f"*{dtype}:16",
            "p_cos": "*fp32:16",
            "p_sin": "*fp32:16",
            "total": "i32",
        },
        constexprs={
            "H": 12,
            "HALF_DIM": head_dim // 2,
            "BLOCK_M": tile.rows,
            "BLOCK_D": tile.block_d,
        },
        num_warps=tile.num_warps,
        num_stages=3,
        arch=arch,
    )


def gated_case(N: int, activation: str, dtype: str, arch: int) -> CompileCase:
    return CompileCase(
        name=f"gated-N{N}-{activation}-{dtype}-sm_{arch}",
        kernel="encoder_fast.kernels.gated:gated_kernel",
        signature={"p_x": f"*{dtype}:16", "p_out": f"*{dtype}:16", "M": "i32"},
        constexprs={
            "N": N,
            "ACTIVATION": activation,
            "BLOCK_M": gated.BLOCK_M,
            "BLOCK_N": gated.BLOCK_N,
        },
        num_warps=gated.NUM_WARPS,
        num_stages=3,
        arch=arch,
    )


def cases_for(arch: int) -> list[CompileCase]:
    half = "fp16" if arch in (80, 90) else "bf16"
    cases = [
        rotary_case(head_dim, dtype, arch) for head_dim in HEAD_DIMS for dtype in (half, "fp32")
    ]
    cases += [gated_case(N, "gelu", dtype, arch) for N in GATED_WIDTHS for dtype in (half, "fp32")]
    return [*cases, *(gated_case(1152, name, half, arch) for name in ("gelu_tanh", "relu"))]


@pytest.fixture(scope="module")
def reports() -> dict[str, CompileReport]:
    return compile_cases([case for arch in ARCHS for case in cases_for(arch)])


def shortcomings(case: CompileCase, report: CompileReport) -> list[str]:
    found = problems(report, case.arch)
    accesses = re.findall(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.b(\d+) ", report.ptx)
    narrow = [a for a in accesses if int(a[0] or 1) * int(a[1]) < 128]
    if not accesses or narrow:
        found.append(f"{len(narrow)} of {len(accesses)} accesses are narrower than 16 bytes")
    if report.shared_bytes or "bar.sync" in report.ptx:
        found.append("threads wait for one another")
    if report.registers > 64:
        found.append(f"uses {report.registers} registers, 64 leave room for 32 warps")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids="sm_{}".format)
def test_shipped_configurations_fit_the_card(reports: dict[str, CompileReport], arch: int) -> None:
    wrong = [
        f"{case.name}: {line}"
        for case in cases_for(arch)
        for line in shortcomings(case, reports[case.name])
    ]
    assert not wrong, "\n".join(wrong)
