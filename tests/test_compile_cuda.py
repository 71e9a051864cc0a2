"""Every CUDA kernel that ships, as compiled: no spills, the planned occupancy, the instructions
that were meant. Needs the built extension, and no GPU."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bench.cost.analysis import analyse
from bench.cost.cuda_binary import (
    CompiledKernel,
    compile_fatbin,
    cuobjdump,
    extension,
    read_kernels,
)
from bench.cost.sass import Instruction
from encoder_fast.backends.cuda_kernels import HEAD_SIZES, HEAD_SIZES_OF_OP

ROOT = Path(__file__).resolve().parents[1]
BUILT = extension()

pytestmark = pytest.mark.slow
needs_the_extension = pytest.mark.skipif(
    BUILT is None or cuobjdump() is None or shutil.which("c++filt") is None,
    reason="the extension encoder_fast._cuda, cuobjdump and c++filt are needed",
)

ARCHS = ("sm_80", "sm_90a")

ROW_KERNEL = re.compile(r"_layer_norm_kernel<RowTraits<(\w+), (\d+), (\d+), \d+>")
GELU_KERNEL = re.compile(r"bias_gelu_kernel<GeluTraits<(\w+), (\d+)>")
ATTENTION_KERNEL = re.compile(r"(?:key_loop|one_tile|disentangled)_kernel<\w+<(\w+), (\d+),")
DISENTANGLED_KERNEL = re.compile(
    r"disentangled_kernel<\w+<(\w+), (\d+), (\w+), (\w+), (\d+), (\d+)>"
)


@pytest.fixture(scope="module")
def resources() -> list[CompiledKernel]:
    """What each kernel takes on both architectures, without its machine code."""
    assert BUILT is not None
    return [kernel for kernel in read_kernels(BUILT, code=False) if kernel.arch in ARCHS]


@pytest.fixture(scope="module")
def kernels() -> list[CompiledKernel]:
    """With the machine code, on one architecture: nothing in csrc/ asks for which it is compiled,
    and to disassemble takes as long as all other tests of this file. What the sources do on an
    older card, tests/test_compile_cuda_attention.py reads for sm_89."""
    assert BUILT is not None
    return read_kernels(BUILT, arch=ARCHS[-1])


@needs_the_extension
def test_both_architectures_have_every_kernel(resources: list[CompiledKernel]) -> None:
    names = {arch: {k.name for k in resources if k.arch == arch} for arch in ARCHS}
    assert names["sm_80"] == names["sm_90a"]
    rows = [m for m in map(ROW_KERNEL.search, names["sm_80"]) if m]
    assert {m[1] for m in rows} == {"float", "Half", "BFloat16"}
    assert {(m[1], m[2]) for m in map(GELU_KERNEL.search, names["sm_80"]) if m} == {
        *(("float", "4"), ("Half", "8"), ("BFloat16", "8")),
        *(("float", "1"), ("Half", "1"), ("BFloat16", "1")),
    }
    attention = {(m[1], int(m[2])) for m in map(ATTENTION_KERNEL.search, names["sm_80"]) if m}
    disentangled = [m for m in map(DISENTANGLED_KERNEL.search, names["sm_80"]) if m]
    # Head size, which of the two tables there are, and warps.
    assert {(m[1], int(m[2]), m[3], m[4], int(m[5])) for m in disentangled} == {
        (t, d, key, query, warps)
        for t in ("Half", "BFloat16")
        for d in HEAD_SIZES_OF_OP["disentangled_attention"]
        for key, query in (("true", "true"), ("true", "false"), ("false", "true"))
        for warps in (2, 4)
    }
    assert HEAD_SIZES is not None
    assert attention == {(t, d) for t in ("Half", "BFloat16") for d in HEAD_SIZES}


@needs_the_extension
def test_kernels_stay_within_their_plan(resources: list[CompiledKernel]) -> None:
    assert all(kernel.resident_blocks for kernel in resources)
    wrong = [
        f"{k.arch} {k.name}: {k.outgrows_its_plan()}" for k in resources if k.outgrows_its_plan()
    ]
    assert not wrong, "\n".join(wrong)


def narrow_accesses(kernel: CompiledKernel) -> list[str]:
    """Accesses of less than 16 bytes that were not meant, in kernels for aligned operands."""
    match = ROW_KERNEL.search(kernel.name) or GELU_KERNEL.search(kernel.name)
    if match is None or match[2] == "1":
        return []
    meant = {"LDG": {"128"}, "STG": {"128"}}
    if match[1] == "float":
        meant["LDG"].add("64")  # four elements of a vector in half precision
    if "embed" in kernel.name:
        meant["LDG"] |= {"64", "32"}  # an id
    found = []
    for mnemonic in kernel.instructions:
        operation, *modifiers = mnemonic.split(".")
        if operation in meant:
            sizes = {"64", "128", "U16", "U8", "S16"} & set(modifiers) or {"32"}
            if not sizes <= meant[operation]:
                found.append(mnemonic)
    if not kernel.count(r"LDG\..*128.*") or not kernel.count(r"STG\..*128.*"):
        found.append("no access of 16 bytes")
    return found


@needs_the_extension
def test_memory_is_accessed_16_bytes_at_a_time(kernels: list[CompiledKernel]) -> None:
    wrong = [f"{k.arch} {k.name}: {narrow_accesses(k)}" for k in kernels if narrow_accesses(k)]
    assert not wrong, "\n".join(wrong)


@needs_the_extension
def test_rows_of_a_warp_pass_no_barrier(kernels: list[CompiledKernel]) -> None:
    for kernel in kernels:
        match = ROW_KERNEL.search(kernel.name)
        if match is not None:
            has_barrier = kernel.count(r"BAR\..*") > 0
            assert has_barrier == (int(match[3]) > 32), kernel.name


@needs_the_extension
def test_attention_is_on_the_matrix_units(kernels: list[CompiledKernel]) -> None:
    for kernel in kernels:
        match = ATTENTION_KERNEL.search(kernel.name)
        if match is None:
            continue
        products = r"HMMA\.16816\.F32\.BF16" if match[1] == "BFloat16" else r"HMMA\.16816\.F32"
        assert kernel.count(products), kernel.name
        assert kernel.count(r"LDSM\..*\.4"), kernel.name
        assert kernel.count(r"LDGSTS\..*\.128"), kernel.name
        assert not kernel.count(r"LDGSTS\..*\.(32|64)"), kernel.name


@needs_the_extension
def test_positions_take_no_detour(kernels: list[CompiledKernel]) -> None:
    """A tile of disentangled attention: one barrier, no product beside those counted in
    docs/kernels/disentangled_attention.md, and a shuffle for each element of the query's term, one
    for two of the key's, and 8 for the rows' maxima."""
    found = 0
    for kernel in kernels:
        match = DISENTANGLED_KERNEL.search(kernel.name)
        if match is None:
            continue
        found += 1
        has_key, has_query = match[3] == "true", match[4] == "true"
        analysis = analyse(kernel.code)
        assert analysis.barriers == 1, kernel.name
        step = analysis.step
        assert step is not None and step.copy_waits == 1, kernel.name
        # 32 rows by 32 keys for each 16 elements of a head: 8 products for q k, p v, the key's
        # term, and 12 for the query's.
        products = int(match[2]) // 16 * (16 + 8 * has_key + 12 * has_query)
        assert sum(step.shapes.values()) == products, kernel.name
        assert step.shuffle == 8 + 16 * has_key + 32 * has_query, kernel.name
    assert found == 24


@needs_the_extension
def test_shortcomings_would_be_noticed(kernels: list[CompiledKernel]) -> None:
    kernel = next(k for k in kernels if "add_layer_norm_kernel<RowTraits<Half, 8, 32, 3>" in k.name)
    assert kernel.outgrows_its_plan() is None and not narrow_accesses(kernel)
    spilling = replace(kernel, stack_bytes=8)
    assert "spills" in str(spilling.outgrows_its_plan())
    larger = replace(kernel, registers=kernel.registers + 8)
    assert "not resident together" in str(larger.outgrows_its_plan())
    narrow = replace(kernel, code=[*kernel.code, Instruction(0, "LDG.E.64", "R0, [R2.64]")])
    assert narrow_accesses(narrow) == ["LDG.E.64"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda path: path.stem)
def test_other_architectures_compile(source: Path, tmp_path: Path) -> None:
    """What a default build leaves out has from Blackwell on another compiler inside nvcc. Before
    that it is the assembler alone that differs; tests/test_compile_cuda_attention.py has more."""
    compile_fatbin(source, {"120": ["120"]}, tmp_path)
