"""The attention kernels compiled for the architectures that a default build leaves out.

tests/test_compile_cuda.py reads the built extension, for the architectures that ship. Every tile
must fit the others too, whose owners compile for themselves: without spills, as many blocks
resident as the traits plan, on the matrix units and with 16 bytes an access.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from bench.cost.cuda_binary import CSRC, CompiledKernel, compile_fatbin, cuobjdump, read_kernels

# By what nvcc's front end compiles for. From Blackwell on it has another compiler inside.
ARCHS = {"80": ("89",), "100": ("100", "120")}
HEAD_DIMS = (32, 64, 128)

# Longest sequence of each class that has a tile of its own, by head size; None is the loop over
# tiles of keys. docs/kernels/cuda_attention.md says why.
CLASSES = {32: {32, 64, 128, 256, None}, 64: {32, 64, 128, None}, 128: {32, 64, 128, None}}

ONE_TILE = re.compile(r"one_tile_kernel<OneTileTraits<(\w+), (\d+), (\d+),")
KEY_LOOP = re.compile(r"key_loop_kernel<KeyLoopTraits<(\w+), (\d+),")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nvcc") is None or cuobjdump() is None or shutil.which("c++filt") is None,
        reason="nvcc, cuobjdump and c++filt are needed",
    ),
]


def compiled(source: str, folder: Path) -> list[CompiledKernel]:
    kernels = read_kernels(compile_fatbin(CSRC / "attention" / source, ARCHS, folder))
    assert {kernel.arch for kernel in kernels} == {f"sm_{a}" for a in sum(ARCHS.values(), ())}
    for kernel in kernels:
        assert kernel.resident_blocks, kernel.name
        assert kernel.outgrows_its_plan() is None, f"{kernel.name}: {kernel.outgrows_its_plan()}"
    return kernels


@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"D{head_dim}")
def test_every_tile_fits_every_architecture(head_dim: int, tmp_path: Path) -> None:
    kernels = compiled(f"heads_of_{head_dim}.cu", tmp_path)
    found: dict[str, set[tuple[str, int | None]]] = {kernel.arch: set() for kernel in kernels}
    for kernel in kernels:
        label = f"{kernel.arch} {kernel.name}"
        if match := ONE_TILE.search(kernel.name):
            found[kernel.arch].add((match[1], int(match[3])))
        else:
            match = KEY_LOOP.search(kernel.name)
            assert match is not None, label
            found[kernel.arch].add((match[1], None))
        assert int(match[2]) == head_dim, label
        # Two blocks at least, so that one loads while another computes.
        assert kernel.resident_blocks >= 2, label
        type_of_products = r"\.BF16" if match[1] == "BFloat16" else ""
        assert kernel.count(rf"HMMA\.16816\.F32{type_of_products}"), label
        # Both layouts of the right operand, four matrices at a time.
        assert kernel.count(r"LDSM\.16\.M88\.4") and kernel.count(r"LDSM\.16\.MT88\.4"), label
        for access in ("LDGSTS", "STG"):
            assert kernel.count(rf"{access}\..*\.128(\..*)?"), label
            assert not kernel.count(rf"{access}(?!.*\.128).*"), label
    types = ("Half", "BFloat16")
    expected = {(t, keys) for t in types for keys in CLASSES[head_dim]}
    assert all(tiles == expected for tiles in found.values()), found


def test_list_of_tiles_fits_every_architecture(tmp_path: Path) -> None:
    (name,) = {kernel.name for kernel in compiled("list_tiles.cu", tmp_path)}
    assert name.startswith("list_tiles_kernel(")
