"""Every launch configuration of the attention kernel, compiled for cards that are not there."""

from __future__ import annotations

import pytest
import torch
from triton_compile import ARCHS, SHARED_LIMIT, CompileCase, CompileReport, compile_cases, problems

from encoder_fast.kernels.attention import AttentionConfig, choose_config, ladders

HEAD_DIMS = (16, 32, 64, 96, 128)

# fp16 and bf16 share their configurations and compile alike but for the type in the instruction, so
# each takes half of the architectures. fp32 runs both ways that PyTorch's setting can ask for.
PRECISIONS = {
    80: (("fp16", "tf32"), ("fp32", "ieee"), ("fp32", "tf32")),
    89: (("bf16", "tf32"), ("fp32", "ieee"), ("fp32", "tf32")),
    90: (("fp16", "tf32"), ("fp32", "ieee"), ("fp32", "tf32")),
    100: (("bf16", "tf32"), ("fp32", "ieee"), ("fp32", "tf32")),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TENSOR_CORES = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def shipped(head_dim: int, dtype: torch.dtype, arch: int) -> list[AttentionConfig]:
    by_longest, by_mean = ladders(head_dim, dtype, SHARED_LIMIT[arch])
    return [config for _, config in by_longest + by_mean]


def case_of(
    config: AttentionConfig, head_dim: int, dtype: str, precision: str, arch: int
) -> CompileCase:
    kind = "packed" if config.pack_rows else "one" if config.one_key_tile else "loop"
    tile = f"{config.block_m}x{config.block_n}-w{config.num_warps}-s{config.num_stages}"
    signature = {f"p_{name}": f"*{dtype}:16" for name in ("out", "q", "k", "v")}
    signature["p_cu_seqlens"] = "*i32"
    for name in ("q", "k", "v"):
        signature[f"stride_{name}_row"] = signature[f"stride_{name}_head"] = "i32:16"
    for name in ("total", "batch", "heads", "tiles_per_sequence", "search_steps"):
        signature[name] = "i32"
    signature["scale_log2"] = "fp32"
    return CompileCase(
        name=f"{dtype}-{precision}-D{head_dim}-{kind}-{tile}",
        kernel="encoder_fast.kernels.attention:attention_kernel",
        signature=signature,
        constexprs={
            "HEAD_DIM": head_dim,
            "BLOCK_D": 128 if head_dim == 96 else head_dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "ONE_KEY_TILE": config.one_key_tile,
            "PACK_ROWS": config.pack_rows,
            "INPUT_PRECISION": precision,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        arch=arch,
    )


def cases_for(arch: int) -> list[CompileCase]:
    return [
        case_of(config, head_dim, dtype, precision, arch)
        for dtype, precision in PRECISIONS[arch]
        for head_dim in HEAD_DIMS
        for config in shipped(head_dim, DTYPES[dtype], arch)
    ]


def shortcomings(case: CompileCase, report: CompileReport) -> list[str]:
    found = problems(report, case.arch)
    if report.error:
        return found
    half = not case.name.startswith("fp32")
    if half and TENSOR_CORES[case.arch] not in report.ptx:
        found.append(f"never uses {TENSOR_CORES[case.arch]}")
    if not case.constexprs["ONE_KEY_TILE"] and not report.count(r"cp\.async\.c[ag]"):
        found.append("loads keys and values without asynchronous copies")
    # Aligned rows are read and written 16 bytes at a time, where a tile has that much for a thread.
    tile = case.constexprs["BLOCK_M"] * case.constexprs["BLOCK_D"] * (2 if half else 4)
    if tile >= 16 * 32 * case.num_warps:
        if not report.count(r"ld\.global[\w.:]*\.v4\.b32"):
            found.append("has no 16-byte loads")
        if not report.count(r"st\.global[\w.:]*\.v4\.b32"):
            found.append("has no 16-byte stores")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
def test_shipped_configurations_fit_the_card(arch: int) -> None:
    cases = cases_for(arch)
    reports = compile_cases(cases)
    wrong = [
        f"{case.name}: {line}" for case in cases for line in shortcomings(case, reports[case.name])
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("shared_memory", sorted(set(SHARED_LIMIT.values())))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"D{head_dim}")
def test_every_length_gets_a_tile_that_holds_it(
    head_dim: int, dtype: torch.dtype, shared_memory: int
) -> None:
    # Around each rung, and the longest sequence there is; the mean is at most the longest.
    lengths = (0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 160, 161, 512, 8192)
    for longest in lengths:
        for mean in (length for length in lengths if length <= longest):
            config = choose_config(head_dim, dtype, longest, mean, shared_memory)
            reach = config.block_m - 1 + 2 * (longest - 1) + 1 if config.pack_rows else longest
            if config.one_key_tile:
                assert reach <= config.block_n, f"{config} for {longest} keys"
