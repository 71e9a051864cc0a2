"""What the launchers of attention launch, compiled for cards that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
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
from encoder_fast.kernels import local_attention
from encoder_fast.kernels.attention import (
    CLASS_LENGTHS,
    AttentionConfig,
    attention,
    choose_config,
    ladders,
)

HEAD_DIMS = (16, 32, 64, 96, 128)
# Heads of 16 and 96 have the tiles of 32 and 128, which take no less of a card.
BOUNDS = (32, 64, 128)
KINDS = ("plain", "biased", "local")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# float32 runs both ways that PyTorch's setting can ask for.
PRECISIONS = {"fp16": ("highest",), "bf16": ("highest",), "fp32": ("highest", "high")}
TENSOR_CORES = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

# (sequences, tokens of each) that between them reach every rung of the ladders, and every class of
# the launch table.
BATCHES = ((4, 16), (4, 32), (4, 64), (4, 128), (4, 160), *((2, n) for n in CLASS_LENGTHS))

# Mostly in float32.
OTHER_TRITON_SPILLS = 128


def launch_attention(
    kind: str, dtype: str, precision: str, head_dim: int, bias_dtype: str | None = None
) -> None:
    """On packed q, k and v as the engine has them, and on rows that begin anywhere."""
    torch.set_float32_matmul_precision(precision)
    bias = torch.empty(12, 255, dtype=DTYPES[bias_dtype or dtype]) if kind == "biased" else None
    for batch, length in BATCHES:
        cu_seqlens = torch.empty(batch + 1, dtype=torch.int32)
        for begin in (0, 1):
            wide = torch.empty(batch * length, 3, 12, head_dim + begin, dtype=DTYPES[dtype])
            q, k, v = wide[..., begin:].unbind(1)
            if kind == "local":
                local_attention.local_attention(q, k, v, cu_seqlens, length, 0.125, 64)
            else:
                attention(q, k, v, cu_seqlens, length, 0.125, bias)


def combinations(arch: int) -> Iterator[tuple[str, str, str, int]]:
    """The kinds, dtypes, precisions and head sizes that are compiled for an architecture."""
    head_dims = HEAD_DIMS if arch == 90 else BOUNDS
    for kind, dtype, head_dim in product(KINDS, (HALF_ON[arch], "fp32"), head_dims):
        for precision in PRECISIONS[dtype]:
            yield kind, dtype, precision, head_dim


def calls_for(arch: int) -> Iterator[LauncherCall]:
    function = "test_compile_attention:launch_attention"
    for kind, dtype, precision, head_dim in combinations(arch):
        arguments = {"kind": kind, "dtype": dtype, "head_dim": head_dim}
        yield LauncherCall(function, {**arguments, "precision": precision}, arch)
    # A bias may be float32 beside half precision.
    arguments = {"kind": "biased", "dtype": HALF_ON[arch], "head_dim": 64, "bias_dtype": "fp32"}
    yield LauncherCall(function, {**arguments, "precision": "highest"}, arch)


@pytest.fixture(scope="module")
def launches() -> list[CompiledKernel]:
    # In one go: starting a process that compiles costs as much as some kernels.
    return compile_launches([call for arch in ARCHS for call in calls_for(arch)])


def kind_of(kernel: CompiledKernel) -> str:
    if kernel.kernel == "local_attention_kernel":
        return "local"
    return "biased" if "p_bias" in kernel.types else "plain"


def shortcomings(kernel: CompiledKernel) -> list[str]:
    found = problems(kernel, OTHER_TRITON_SPILLS)
    if kernel.error:
        return found
    half = kernel.types["p_out"] != "*fp32:16"
    tile = kernel.constants
    # From Hopper on they take 64 rows at the least; a packed tile of 32 runs on Ampere's.
    tensor_cores = TENSOR_CORES[kernel.arch if tile["BLOCK_M"] >= 64 else 80]
    if half and tensor_cores not in kernel.ptx:
        found.append(f"never uses {tensor_cores}")
    if not tile.get("ONE_KEY_TILE") and not kernel.count(r"cp\.async\.c[ag]"):
        found.append("loads keys and values without asynchronous copies")
    # Aligned rows are read and written 16 bytes at a time, where a tile has that much for a thread.
    tile_bytes = tile["BLOCK_M"] * tile["BLOCK_D"] * (2 if half else 4)
    if tile_bytes >= 16 * 32 * kernel.num_warps:
        if not kernel.count(r"ld\.global[\w.:]*\.v4\.b32"):
            found.append("has no 16-byte loads")
        if not kernel.count(r"st\.global[\w.:]*\.v4\.b32"):
            found.append("has no 16-byte stores")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
def test_launches_fit_the_card(arch: int, launches: list[CompiledKernel]) -> None:
    here = [kernel for kernel in launches if kernel.arch == arch]
    wrong = [f"{kernel}: {line}" for kernel in here for line in shortcomings(kernel)]
    assert not wrong, "\n".join(wrong)


def launched(kernel: CompiledKernel) -> tuple[object, ...]:
    """What tells launches of one architecture apart."""
    tile = kernel.constants
    sizes = (tile["BLOCK_M"], tile["BLOCK_N"], kernel.num_warps, kernel.num_stages)
    dtype, _, _ = kernel.types["p_out"].removeprefix("*").partition(":")
    rest = (kind_of(kernel), dtype, tile["INPUT_PRECISION"], tile["HEAD_DIM"])
    return (*rest, *sizes, tile.get("ONE_KEY_TILE", False), tile.get("PACK_ROWS", False))


def shipped(arch: int) -> Iterator[tuple[object, ...]]:
    """The same of every configuration in the ladders."""
    of_triton = {"highest": "ieee", "high": "tf32"}
    # In half precision as the launcher says it, where it has no meaning.
    for kind, dtype, asked, head_dim in combinations(arch):
        precision = of_triton[asked] if dtype == "fp32" else "tf32"
        which = (head_dim, DTYPES[dtype], SHARED_LIMIT[arch])
        if kind == "local":
            local = asdict(local_attention.choose_config(*which))
            yield (kind, dtype, precision, head_dim, *local.values(), False, False)
        else:
            for _, config in sum(ladders(*which, kind == "biased"), ()):
                yield (kind, dtype, precision, head_dim, *asdict(config).values())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
def test_every_configuration_is_launched(arch: int, launches: list[CompiledKernel]) -> None:
    here = {launched(k) for k in launches if k.arch == arch and not k.error}
    assert here == set(shipped(arch))


def test_heads_of_other_sizes_have_the_same_tiles() -> None:
    """Why those that are compiled on every architecture stand for all."""
    for (head_dim, bound), dtype, shared_memory in product(
        ((16, 32), (96, 128)), DTYPES.values(), set(SHARED_LIMIT.values())
    ):
        for biased in (False, True):
            which = (dtype, shared_memory, biased)
            assert ladders(head_dim, *which) == ladders(bound, *which)
        which = (dtype, shared_memory)
        assert local_attention.choose_config(head_dim, *which) == local_attention.choose_config(
            bound, *which
        )


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
