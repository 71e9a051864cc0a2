"""Every launch configuration of disentangled attention, compiled for cards that are not there."""

from __future__ import annotations

import pytest
import torch
from triton_compile import ARCHS, SHARED_LIMIT, CompileCase, compile_cases, problems

from encoder_fast.kernels.disentangled_attention import DisentangledConfig, configs

# fp16 and bf16 compile alike but for the type in the instruction, so each takes half of the
# architectures.
HALF = {80: "fp16", 89: "bf16", 90: "fp16", 100: "bf16"}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BOTH = (True, True)


def case_of(
    config: DisentangledConfig,
    head_dim: int,
    dtype: str,
    precision: str,
    arch: int,
    terms: tuple[bool, bool] = BOTH,
) -> CompileCase:
    has_key, has_query = terms
    arrays = ("q", "k", "v", "pos_key", "pos_query")
    signature = {f"p_{name}": f"*{dtype}:16" for name in ("out", *arrays)}
    signature["p_row"] = signature["p_cu_seqlens"] = "*i32"
    for name in arrays:
        signature[f"stride_{name}_row"] = signature[f"stride_{name}_head"] = "i32:16"
    for name in ("total", "batch", "heads", "tiles_per_sequence", "search_steps", "reach"):
        signature[name] = "i32"
    signature["scale_log2"] = "fp32"
    return CompileCase(
        name=f"{dtype}-{precision}-D{head_dim}-{config.block_m}x{config.chunk}-{terms}",
        kernel="encoder_fast.kernels.disentangled_attention:disentangled_attention_kernel",
        signature=signature,
        constexprs={
            "HEAD_DIM": head_dim,
            "BLOCK_D": head_dim,
            "BLOCK_M": config.block_m,
            "CHUNK": config.chunk,
            "HAS_POS_KEY": has_key,
            "HAS_POS_QUERY": has_query,
            "INPUT_PRECISION": precision,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        arch=arch,
    )


def cases_for(arch: int) -> list[CompileCase]:
    half = HALF[arch]
    cases = [
        case_of(config, head_dim, half, "tf32", arch)
        for head_dim in (32, 64, 128)
        for config in dict.fromkeys(configs(head_dim, DTYPES[half], SHARED_LIMIT[arch]))
    ]
    # All DeBERTas have heads of 64. Wider ones in float32 run, but spill registers.
    for precision in ("ieee", "tf32"):
        config, _ = configs(64, torch.float32, SHARED_LIMIT[arch])
        cases.append(case_of(config, 64, "fp32", precision, arch))
    if arch == 90:
        _, config = configs(64, DTYPES[half], SHARED_LIMIT[arch])
        for terms in ((True, False), (False, True)):
            cases.append(case_of(config, 64, half, "tf32", arch, terms))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
def test_shipped_configurations_fit_the_card(arch: int) -> None:
    cases = cases_for(arch)
    reports = compile_cases(cases)
    wrong = []
    for case in cases:
        report = reports[case.name]
        # Four products of 64 by 32 in a row, each waited for: none is long enough to overlap with.
        found = [line for line in problems(report, arch) if "wgmma" not in line]
        half = case.name.startswith(HALF[arch])
        if half and not report.error and not report.tensor_core_ops:
            found.append("never uses the tensor cores")
        if case.num_stages > 1 and not report.count(r"cp\.async\.c[ag]"):
            found.append("loads without asynchronous copies")
        # One shuffle an element and term, and the reductions over rows: the general lowering of a
        # gather, which this kernel is written to avoid, takes four times as many and more. (With
        # one term alone, Triton changes layouts by shuffles too.)
        values = case.constexprs["BLOCK_M"] * case.constexprs["CHUNK"] // (32 * case.num_warps)
        both = case.constexprs["HAS_POS_KEY"] and case.constexprs["HAS_POS_QUERY"]
        if half and both and report.count(r"shfl\.sync") > 2 * values + 48:
            found.append(f"takes {report.count(r'shfl.sync')} shuffles for {values} values")
        wrong += [f"{case.name}: {line}" for line in found]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head_dim", (16, 32, 64, 96, 128), ids=lambda head_dim: f"D{head_dim}")
def test_a_tile_is_one_or_two_chunks(head_dim: int, dtype: torch.dtype) -> None:
    for shared_memory in set(SHARED_LIMIT.values()):
        for config in configs(head_dim, dtype, shared_memory):
            assert config.chunk <= 32
            assert config.block_m in (config.chunk, 2 * config.chunk)
