"""Every case compiled for every architecture, counted, and put into clocks and times."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cost.analysis import Analysis, analyse
from bench.cost.cases import Case, Cut, cuda_cases
from bench.cost.cuda_binary import (
    CSRC,
    CompiledKernel,
    compile_fatbin,
    cuobjdump,
    extension,
    read_kernels,
)
from bench.cost.pipes import CARDS, Card, Clocks, clocks, resident_blocks
from bench.cost.sass import parse
from bench.cost.sizes import Size
from bench.cost.triton_compile import LauncherCall, launches_of

# What nvcc calls the architectures.
TARGETS = {80: "80", 90: "90a", 100: "100a"}


@dataclass(frozen=True)
class Cost:
    """A case on an architecture.

    Attributes:
        shared_bytes: of a block; ``None`` where only its launcher knows.
        resident: blocks that a multiprocessor holds together.
    """

    case: Case
    arch: int
    cut: Cut
    warps: int
    stages: int | None
    registers: int
    spills_bytes: int
    shared_bytes: int | None
    resident: int
    analysis: Analysis

    @property
    def card(self) -> Card:
        return CARDS[self.arch]

    def clocks(self) -> tuple[Clocks | None, Clocks]:
        """Of a step through the loop, and of what is around it."""
        warps = self.cut.warps or self.warps
        step, around = self.analysis.step, self.analysis.around
        of_step, of_around = self._fma_of_tcgen05()
        return (
            None if step is None else clocks(step, warps, self.card, of_step),
            clocks(around, warps, self.card, of_around),
        )

    def _fma_of_tcgen05(self) -> tuple[float, float]:
        """What its products have to do in a step and around the loop: they don't say it."""
        if not (self.case.sizes and self.analysis.around.tcgen05):
            return 0.0, 0.0
        size = self.case.sizes[-1]
        of_pass = size.operations / 2 / (size.rows / self.cut.rows)
        if self.analysis.step is None:
            return 0.0, of_pass
        of_step = of_pass * self.cut.keys / size.keys
        return of_step, of_step * self.cut.peeled


@dataclass(frozen=True)
class Prediction:
    """Seconds: of the bytes, with all pipes at once, and with products and the rest in turn."""

    size: Size
    pipe: str
    memory: float
    overlapped: float
    in_turn: float

    @property
    def bound(self) -> str:
        return "memory" if self.memory >= self.overlapped else self.pipe

    @property
    def least(self) -> float:
        return max(self.memory, self.overlapped)

    @property
    def most(self) -> float:
        return max(self.memory, self.in_turn)


def predict(cost: Cost, size: Size) -> Prediction:
    step, around = cost.clocks()
    passes, steps = cost.cut.passes(size)
    whole = around.scaled(passes)
    if step is not None:
        whole += step.scaled(steps)
    pipe, most = whole.bound
    per_second = cost.card.multiprocessors * cost.card.clock
    return Prediction(
        size, pipe, size.moved / cost.card.copy, most / per_second, whole.in_turn / per_second
    )


def triton_costs(cases: Iterable[Case], archs: Sequence[int], workers: int = 1) -> list[Cost]:
    """Cases of Triton kernels, compiled through their launchers."""
    wanted = [(case, arch) for case in cases for arch in archs]
    calls = []
    for case, arch in wanted:
        assert case.launch is not None
        function, arguments = case.launch
        calls.append(LauncherCall(f"bench.cost.launches:{function}", arguments, arch))
    found = []
    for (case, arch), kernels in zip(wanted, launches_of(calls, workers), strict=True):
        if len(kernels) != 1 or kernels[0].error:
            found_instead = "\n".join(kernel.error or str(kernel) for kernel in kernels)
            raise RuntimeError(f"{case.name} on sm_{arch} launches\n{found_instead}")
        (kernel,) = kernels
        found.append(
            Cost(
                case,
                arch,
                case.cut(kernel.constants),
                kernel.num_warps,
                kernel.num_stages,
                kernel.registers,
                kernel.spills_bytes,
                kernel.shared_bytes,
                resident_blocks(
                    kernel.registers, kernel.num_warps, kernel.shared_bytes, CARDS[arch]
                ),
                _analysis_of(kernel.cubin),
            )
        )
    return found


def _analysis_of(cubin: str) -> Analysis:
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump is needed, of Triton's package or the CUDA toolkit")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(base64.b64decode(cubin))
        file.flush()
        said = subprocess.run(
            [tool, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    (code,) = parse(said.splitlines()).values()
    return analyse(code)


def built_kernels(archs: Sequence[int]) -> list[CompiledKernel]:
    """The CUDA kernels of the cases: of the built extension, and by nvcc for what it leaves out.

    Architectures are left out where neither is there.
    """
    patterns = "|".join(case.pattern for case in cuda_cases())
    found: list[CompiledKernel] = []
    built = extension()
    if built is not None:
        found += read_kernels(built, patterns)
    missing = [arch for arch in archs if arch not in {kernel.number for kernel in found}]
    nvcc = shutil.which("nvcc")
    if missing and nvcc is not None:
        for source in sorted(CSRC.rglob("*.cu")):
            with tempfile.TemporaryDirectory() as folder:
                targets = {TARGETS[arch]: [TARGETS[arch]] for arch in missing}
                found += read_kernels(compile_fatbin(source, targets, Path(folder)), patterns)
    return [kernel for kernel in found if kernel.number in archs]


def cuda_costs(cases: Iterable[Case], kernels: Iterable[CompiledKernel]) -> list[Cost]:
    """Cases of CUDA kernels, on every architecture that they were compiled for."""
    kernels = list(kernels)
    return [
        Cost(
            case,
            kernel.number,
            case.cut(kernel.name),
            kernel.threads // 32,
            None,
            kernel.registers,
            kernel.stack_bytes,
            None,
            kernel.resident_blocks,
            analyse(kernel.code),
        )
        for case in cases
        for kernel in kernels
        if re.search(case.pattern, kernel.name)
    ]
