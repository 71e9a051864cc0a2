"""What the launcher of disentangled attention launches, compiled for cards that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from bench.cost.triton_compile import (
    ARCHS,
    HALF_ON,
    SHARED_LIMIT,
    CompiledKernel,
    LauncherCall,
    compile_launches,
    problems,
)
from encoder_fast.kernels.disentangled_attention import configs, disentangled_attention

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def launch(
    dtype: str, head_dim: int, precision: str = "highest", terms: tuple[bool, bool] = (True, True)
) -> None:
    """Short batches and a long one, of rows as the engine has them and of others."""
    torch.set_float32_matmul_precision(precision)
    for length, begin in product((16, 32, 512), (0, 1)):
        wide = torch.empty(2 * length, 3, 12, head_dim + begin, dtype=DTYPES[dtype])
        q, k, v = wide[..., begin:].unbind(1)
        table = torch.empty(512, 12, head_dim, dtype=DTYPES[dtype])
        pos_key, pos_query = (table if there else None for there in terms)
        rows, cu_seqlens = torch.empty(511, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
        disentangled_attention(q, k, v, pos_key, pos_query, rows, cu_seqlens, length, 0.125)


def calls_for(arch: int) -> Iterator[LauncherCall]:
    function = "test_compile_disentangled:launch"
    half = HALF_ON[arch]
    for head_dim in (32, 64, 128):
        yield LauncherCall(function, {"dtype": half, "head_dim": head_dim}, arch)
    # All DeBERTas have heads of 64. Wider ones in float32 run, but spill registers.
    for precision in ("highest", "high"):
        arguments = {"dtype": "fp32", "head_dim": 64, "precision": precision}
        yield LauncherCall(function, arguments, arch)
    for terms in ((True, False), (False, True)):
        yield LauncherCall(function, {"dtype": half, "head_dim": 64, "terms": terms}, arch)


@pytest.fixture(scope="module")
def launches() -> list[CompiledKernel]:
    return compile_launches([call for arch in ARCHS for call in calls_for(arch)])


def shortcomings(kernel: CompiledKernel) -> list[str]:
    # Four products of 64 by 32 in a row, each waited for: none is long enough to overlap with.
    found = [line for line in problems(kernel) if "wgmma" not in line]
    if kernel.error:
        return found
    half = kernel.types["p_out"] != "*fp32:16"
    if half and not kernel.tensor_core_ops:
        found.append("never uses the tensor cores")
    if kernel.num_stages > 1 and not kernel.count(r"cp\.async\.c[ag]"):
        found.append("loads without asynchronous copies")
    # One shuffle an element and term, and the reductions over rows: the general lowering of a
    # gather, which this kernel is written to avoid, takes four times as many and more. (With
    # one term alone, Triton changes layouts by shuffles too.)
    tile = kernel.constants
    values = tile["BLOCK_M"] * tile["CHUNK"] // (32 * kernel.num_warps)
    shuffles = kernel.count(r"shfl\.sync")
    if half and tile["HAS_POS_KEY"] and tile["HAS_POS_QUERY"] and shuffles > 2 * values + 48:
        found.append(f"takes {shuffles} shuffles for {values} values")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
def test_launches_fit_the_card(arch: int, launches: list[CompiledKernel]) -> None:
    here = [kernel for kernel in launches if kernel.arch == arch]
    wrong = [f"{kernel}: {line}" for kernel in here for line in shortcomings(kernel)]
    assert not wrong, "\n".join(wrong)
    tiles = {(k.constants["BLOCK_M"], k.constants["CHUNK"]) for k in here}
    expected = (
        (config.block_m, config.chunk)
        for head_dim, dtype in ((32, "fp16"), (64, "fp16"), (128, "fp16"), (64, "fp32"))
        for config in configs(head_dim, DTYPES[dtype], SHARED_LIMIT[arch])
    )
    assert tiles == set(expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head_dim", (16, 32, 64, 96, 128), ids=lambda head_dim: f"D{head_dim}")
def test_a_tile_is_one_or_two_chunks(head_dim: int, dtype: torch.dtype) -> None:
    for shared_memory in set(SHARED_LIMIT.values()):
        for config in configs(head_dim, dtype, shared_memory):
            assert config.chunk <= 32
            assert config.block_m in (config.chunk, 2 * config.chunk)
