"""The command: the whole table, or some kernels in detail."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from bench.cost import record
from bench.cost.analysis import analyse
from bench.cost.cases import cuda_cases, triton_cases
from bench.cost.cuda_binary import extension, ptx_version, read_kernels
from bench.cost.measure import TARGETS, built_kernels, cuda_costs, triton_costs
from bench.cost.page import page
from bench.cost.pipes import CARDS
from bench.cost.show import show, show_cost


def compilers() -> dict[str, str]:
    """What decides the machine code."""
    found = {"Triton": version("triton")}
    built = extension()
    if built is not None:
        found["nvcc's PTX"] = ptx_version(built)
    return found


def write_table(page_path: Path, record_path: Path) -> None:
    """Raises RuntimeError without the CUDA extension: the table has both backends or is none."""
    if extension() is None:
        raise RuntimeError("the table needs the CUDA extension, encoder_fast._cuda")
    archs = tuple(CARDS)
    costs = triton_costs(triton_cases(), archs, workers=2)
    costs += cuda_costs(cuda_cases(), built_kernels(archs))
    record.write(record_path, compilers(), costs)
    page_path.write_text(page(compilers(), costs), "utf-8")


def show_kernels(wanted: str, arch: int) -> bool:
    """Print what matches: Triton's by the names of the table, CUDA's by those of the functions."""
    console = Console(highlight=False)
    cases = [case for case in triton_cases() if re.search(wanted, case.key)]
    for cost in triton_costs(cases, [arch]) if cases else []:
        show_cost(console, cost)
    built = extension()
    kernels = [] if built is None else read_kernels(built, wanted, f"sm_{TARGETS[arch]}")
    for kernel in sorted(kernels, key=lambda kernel: kernel.name):
        resources = (
            f"{kernel.registers} registers, {kernel.stack_bytes} bytes of stack, "
            f"{kernel.resident_blocks} blocks planned on a multiprocessor"
        )
        warps = kernel.threads // 32
        show(console, kernel.name, arch, warps, resources, analyse(kernel.code))
    return bool(cases or kernels)
