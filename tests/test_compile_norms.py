"""What the launchers of the LayerNorm kernels launch, compiled for cards that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from bench.cost.triton_compile import (
    ARCHS,
    HALF_ON,
    CompiledKernel,
    LauncherCall,
    compile_launches,
    problems,
)
from encoder_fast.kernels.add_layer_norm import add_layer_norm
from encoder_fast.kernels.embed_layer_norm import embed_layer_norm
from encoder_fast.kernels.row_norm import ACCESS_BYTES, ROW_TILES, row_tile

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# Each tile at the largest width that it serves, and beside that at one whose rows begin anywhere.
WIDEST = tuple(limit for limit, _ in ROW_TILES)
ODD = tuple(limit - 1 for limit in WIDEST)

# Widths inside a rung that many encoders have. Rows of 312 are aligned to 8 elements, not to 16.
COMMON = (312, 384, 768)


def launch(width: int, dtype: str, vector_dtype: str) -> None:
    """Both kernels with all operands: without one they take fewer registers. An odd width stands
    also for rows that are aligned in all but the address of the first."""
    x = torch.empty(100, width, dtype=DTYPES[dtype])
    vector = torch.empty(width, dtype=DTYPES[vector_dtype])
    ids = torch.empty(100, dtype=torch.int64)
    add_layer_norm(x, x, vector, vector, 1e-12, x_bias=vector, sum_out=torch.empty_like(x))
    embed_layer_norm(ids, ids, ids, x, x, x, vector, vector, 1e-12)


def launch_bert(width: int, dtype: str) -> None:
    """As BERT's engine does: no sum is stored, and tables have numbers of rows of their own."""
    x = torch.empty(100, width, dtype=DTYPES[dtype])
    vector = torch.empty(width, dtype=DTYPES[dtype])
    ids = torch.empty(100, dtype=torch.int64)
    word, position, token_type = (torch.empty(n, width, dtype=x.dtype) for n in (30522, 512, 2))
    add_layer_norm(x, x, vector, vector, 1e-12, x_bias=vector)
    embed_layer_norm(ids, ids, ids, word, position, token_type, vector, vector, 1e-12)


def calls_for(arch: int) -> Iterator[LauncherCall]:
    half = HALF_ON[arch]
    for width, dtype in product(WIDEST, (half, "fp32")):
        arguments = {"width": width, "dtype": dtype, "vector_dtype": "fp32"}
        yield LauncherCall("test_compile_norms:launch", arguments, arch)
    # Rows that begin anywhere take registers for their addresses, as many on any card.
    if arch in (80, 100):
        for width, dtype in product(ODD, (half, "fp32")):
            arguments = {"width": width, "dtype": dtype, "vector_dtype": "fp32"}
            yield LauncherCall("test_compile_norms:launch", arguments, arch)
    for width in COMMON:
        arguments = {"width": width, "dtype": half}
        yield LauncherCall("test_compile_norms:launch_bert", arguments, arch)


def shortcomings(kernel: CompiledKernel) -> list[str]:
    found = problems(kernel)
    if kernel.error:
        return found
    width, half = kernel.constants["N"], kernel.types["p_out"] != "*fp32:16"
    if width in ODD:
        return found
    narrow = [access for access in kernel.access_bytes if access < ACCESS_BYTES]
    # An id is a number by itself; three are read.
    ids = 3 if kernel.kernel == "embed_layer_norm_kernel" else 0
    if not kernel.access_bytes or len(narrow) != ids:
        found.append(
            f"{len(narrow)} of {len(kernel.access_bytes)} accesses are narrower than 16 bytes"
        )
    if width <= 1024 and (kernel.shared_bytes or "bar.sync" in kernel.ptx):
        found.append("a row leaves its warp")
    # What 32 warps of a multiprocessor can have each, and 28 beside vectors in float32.
    limit = 64 if kernel.types["p_weight"] == kernel.types["p_out"] else 72
    if half and width <= 1024 and kernel.registers > limit:
        found.append(f"uses {kernel.registers} registers, more than {limit}")
    return found


@pytest.fixture(scope="module")
def launches() -> list[CompiledKernel]:
    """For all architectures together: starting a process costs as much as ten kernels."""
    return compile_launches([call for arch in ARCHS for call in calls_for(arch)])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids="sm_{}".format)
def test_launches_fit_the_card(launches: list[CompiledKernel], arch: int) -> None:
    here = [kernel for kernel in launches if kernel.arch == arch]
    wrong = [f"{kernel}: {line}" for kernel in here for line in shortcomings(kernel)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids="sm_{}".format)
def test_every_tile_is_launched(launches: list[CompiledKernel], arch: int) -> None:
    here = {
        (k.kernel, k.constants["N"], k.constants["BLOCK_M"], k.constants["BLOCK_N"], k.num_warps)
        for k in launches
        if k.arch == arch and not k.error
    }
    for kernel, width, itemsize in product(
        ("add_layer_norm_kernel", "embed_layer_norm_kernel"), WIDEST, (2, 4)
    ):
        tile = row_tile(width)
        assert (kernel, width, tile.rows, tile.block_n(itemsize), tile.num_warps) in here


@pytest.mark.slow
def test_narrow_accesses_are_seen(launches: list[CompiledKernel]) -> None:
    """Those of rows that begin anywhere are, so that the tests above would notice others."""
    odd = [kernel for kernel in launches if kernel.constants.get("N") in ODD]
    assert odd and all(min(kernel.access_bytes) < 8 for kernel in odd)
