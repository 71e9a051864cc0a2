"""The kernels that read a mask, compiled for cards that are not there."""

from __future__ import annotations

import pytest
from triton_compile import ARCHS, CompileCase, CompileReport, compile_cases, problems

from encoder_fast.kernels import pack_mask

# Tokenizers give int64 masks. The others differ in how a value is compared.
OTHER_TYPES = {80: "i1", 89: "bf16", 90: "fp16", 100: "i1"}


def case(
    name: str, arch: int, signature: dict[str, str], constexprs: dict[str, object]
) -> CompileCase:
    sizes = {"B": "i32", "S": "i32", "stride_mask_row": "i32"}
    blocks = {"BLOCK_B": pack_mask.BLOCK_B, "BLOCK_S": pack_mask.BLOCK_S}
    return CompileCase(
        name=f"{name}-{signature['p_mask']}-sm_{arch}",
        kernel=f"encoder_fast.kernels.pack_mask:{name}",
        signature={"p_lengths": "*i32:16", "p_headless": "*i1:16", **sizes, **signature},
        constexprs={**blocks, "stride_mask_col": 1, **constexprs},
        num_warps=pack_mask.NUM_WARPS,
        num_stages=3,
        arch=arch,
    )


def count_case(dtype: str, ids: str | None, arch: int) -> CompileCase:
    signature = {"p_mask": f"*{dtype}:16", "p_facts": "*i64:16"}
    signature |= {"stride_ids_row": "i32", "vocab_size": "i32"}
    constexprs: dict[str, object] = {"ONLOOKERS": True}
    if ids is None:
        signature["stride_ids_col"] = "i32:16"
        constexprs["p_ids"] = None
    else:
        signature["p_ids"] = f"*{ids}:16"
        constexprs["stride_ids_col"] = 1
    return case("count_tokens_kernel", arch, signature, constexprs)


def place_case(dtype: str, arch: int) -> CompileCase:
    signature = {"p_mask": f"*{dtype}:16", "total": "i32"}
    signature |= {"p_cu_seqlens": "*i32:16", "p_indices": "*i64:16", "p_onlooker_rows": "*i64:16"}
    constexprs: dict[str, object] = {"BLOCK_BEFORE": pack_mask.BLOCK_BEFORE}
    return case("place_tokens_kernel", arch, signature, constexprs)


def cases_for(arch: int) -> list[CompileCase]:
    other = OTHER_TYPES[arch]
    return [count_case("i64", "i64", arch), count_case(other, None, arch), place_case(other, arch)]


@pytest.fixture(scope="module")
def reports() -> dict[str, CompileReport]:
    return compile_cases([case for arch in ARCHS for case in cases_for(arch)])


@pytest.mark.slow
@pytest.mark.xdist_group("compile_pack_mask")
@pytest.mark.parametrize("arch", ARCHS, ids="sm_{}".format)
def test_shipped_configurations_fit_the_card(reports: dict[str, CompileReport], arch: int) -> None:
    wrong = [
        f"{case.name}: {line}"
        for case in cases_for(arch)
        for line in problems(reports[case.name], arch)
    ]
    assert not wrong, "\n".join(wrong)
