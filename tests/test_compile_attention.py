"""The launch configurations of the attention kernels, compiled for cards that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from triton_compile import ARCHS, SHARED_LIMIT, CompileCase, CompileReport, compile_cases, problems

from encoder_fast.kernels import local_attention
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

# The configurations were chosen with this release, and there none may spill. In others ptxas saves
# a few registers of one configuration or another, mostly in float32, to get one more block on a
# multiprocessor: no choice of tiles is free of that in all of 3.4, 3.6 and 3.9.
STRICT_TRITON = "3.6."
OTHER_TRITON_SPILLS = 128


def case_of(
    kernel: str, tile: dict[str, object], warps: tuple[int, int], head_dim: int, dtype: str,
    precision: str, arch: int,
) -> CompileCase:  # fmt: skip
    """`kernel` is plain, biased or local."""
    signature = {f"p_{name}": f"*{dtype}:16" for name in ("out", "q", "k", "v")}
    signature["p_cu_seqlens"] = "*i32"
    for name in ("q", "k", "v"):
        signature[f"stride_{name}_row"] = signature[f"stride_{name}_head"] = "i32:16"
    for name in ("total", "batch", "heads", "tiles_per_sequence", "search_steps"):
        signature[name] = "i32"
    signature["scale_log2"] = "fp32"
    constants = {
        **tile,
        "HEAD_DIM": head_dim,
        "BLOCK_D": 128 if head_dim == 96 else head_dim,
        "INPUT_PRECISION": precision,
    }
    if kernel == "local":
        path = "local_attention:local_attention_kernel"
        signature["window_size"] = "i32"
    else:
        path = "attention:attention_kernel"
        signature |= {"stride_bias_head": "i32", "reach": "i32", "bias_scale": "fp32"}
        if kernel == "biased":
            signature["p_bias"] = f"*{dtype}"
        else:
            constants["p_bias"] = None
    name = f"{kernel}-{dtype}-{precision}-D{head_dim}-{'-'.join(map(str, tile.values()))}"
    return CompileCase(
        name=f"sm_{arch}-{name}-w{warps[0]}-s{warps[1]}",
        kernel=f"encoder_fast.kernels.{path}",
        signature=signature,
        constexprs=constants,
        num_warps=warps[0],
        num_stages=warps[1],
        arch=arch,
    )


def cases_for(arch: int, head_dim: int, dtype: str, precision: str) -> Iterator[CompileCase]:
    """Every configuration that ships, on one architecture."""
    shared_memory = SHARED_LIMIT[arch]
    rest = (head_dim, dtype, precision, arch)
    for kernel in ("plain", "biased"):
        by_longest, by_mean = ladders(head_dim, DTYPES[dtype], shared_memory, kernel == "biased")
        for _, config in by_longest + by_mean:
            tile = {
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "ONE_KEY_TILE": config.one_key_tile,
                "PACK_ROWS": config.pack_rows,
            }
            yield case_of(kernel, tile, (config.num_warps, config.num_stages), *rest)
    local = local_attention.choose_config(head_dim, DTYPES[dtype], shared_memory)
    tile = {"BLOCK_M": local.block_m, "BLOCK_N": local.block_n}
    yield case_of("local", tile, (local.num_warps, local.num_stages), *rest)


Launches = list[tuple[CompileCase, CompileReport]]


@pytest.fixture(scope="module")
def launches() -> Launches:
    # In one go: starting a process that compiles costs as much as some cases.
    cases = [
        case
        for arch in ARCHS
        for dtype, precision in PRECISIONS[arch]
        for head_dim in HEAD_DIMS
        for case in cases_for(arch, head_dim, dtype, precision)
    ]
    reports = compile_cases(cases)
    return [(case, reports[case.name]) for case in cases]


def shortcomings(case: CompileCase, report: CompileReport) -> list[str]:
    strict = report.triton_version.startswith(STRICT_TRITON)
    if not strict and report.spills_bytes <= OTHER_TRITON_SPILLS:
        report = replace(report, spills_bytes=0, stack_bytes=0)
    found = problems(report, case.arch)
    if report.error:
        return found
    half = "-fp32-" not in case.name
    # From Hopper on they take 64 rows at the least; a packed tile of 32 runs on Ampere's.
    tensor_cores = TENSOR_CORES[case.arch if case.constexprs["BLOCK_M"] >= 64 else 80]
    if half and tensor_cores not in report.ptx:
        found.append(f"never uses {tensor_cores}")
    if not case.constexprs.get("ONE_KEY_TILE") and not report.count(r"cp\.async\.c[ag]"):
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
def test_shipped_configurations_fit_the_card(arch: int, launches: Launches) -> None:
    here = [(case, report) for case, report in launches if case.arch == arch]
    assert {case.name.split("-")[1] for case, _ in here} == {"plain", "biased", "local"}
    wrong = [f"{case.name}: {line}" for case, report in here for line in shortcomings(case, report)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("biased", (False, True), ids=("plain", "biased"))
@pytest.mark.parametrize("shared_memory", sorted(set(SHARED_LIMIT.values())))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"D{head_dim}")
def test_every_length_gets_a_tile_that_holds_it(
    head_dim: int, dtype: torch.dtype, shared_memory: int, biased: bool
) -> None:
    # Around each rung, and the longest sequence there is; the mean is at most the longest.
    lengths = (0, 1, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 160, 161, 512, 8192)
    for longest in lengths:
        for mean in (length for length in lengths if length <= longest):
            config = choose_config(head_dim, dtype, longest, mean, shared_memory, biased)
            assert config.one_key_tile is False or keys_of_a_tile(config, longest) <= config.block_n


def keys_of_a_tile(config: AttentionConfig, longest: int) -> int:
    """The most keys that a tile's rows can see."""
    return config.block_m - 1 + 2 * (longest - 1) + 1 if config.pack_rows else longest
