"""What the compilers made of the CUDA kernels, read out of the built extension without a GPU.

`cuobjdump`, of the CUDA toolkit or of Triton's package, lists the resources and the machine code of
each kernel for each architecture, and the PTX, which still says how many blocks of how many threads
were to be resident on a multiprocessor: the plan of the traits.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bench.cost.sass import Instruction, parse

REGISTERS = 64 * 1024
"""Of a multiprocessor, on every architecture from sm_80 on."""

# The system's own share of a block's shared memory, which sm_90 and later list as static.
SYSTEM_SHARED = 1024


CSRC = Path(__file__).resolve().parents[2] / "csrc"


@dataclass
class CompiledKernel:
    """One kernel on one architecture."""

    name: str
    arch: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int = 0
    resident_blocks: int = 0
    code: list[Instruction] = field(default_factory=list, repr=False)

    @property
    def number(self) -> int:
        """The architecture, as 90 for sm_90a."""
        return int(re.sub(r"\D", "", self.arch))

    @cached_property
    def instructions(self) -> Counter[str]:
        """How many there are of each mnemonic with its modifiers."""
        return Counter(instruction.name for instruction in self.code)

    def count(self, pattern: str) -> int:
        """How many instructions there are whose mnemonic a regular expression matches fully."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    def outgrows_its_plan(self) -> str | None:
        """What does not fit, in words."""
        if self.stack_bytes:
            return f"spills: {self.stack_bytes} bytes of stack at {self.registers} registers"
        # Registers are given out 8 a thread at a time.
        wanted = -(-self.registers // 8) * 8 * self.threads * self.resident_blocks
        if wanted > REGISTERS:
            return (
                f"{self.registers} registers: {self.resident_blocks} blocks of {self.threads} "
                "threads are not resident together"
            )
        if self.shared_bytes > (SYSTEM_SHARED if self.number >= 90 else 0):
            return f"{self.shared_bytes} bytes of static shared memory"
        return None


def extension() -> Path | None:
    """The built extension; `None` where there is none."""
    spec = importlib.util.find_spec("encoder_fast._cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def cuobjdump() -> str | None:
    """The tool; `None` where there is none."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        packaged = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        if packaged.exists():
            return str(packaged)
    return shutil.which("cuobjdump")


def compile_fatbin(source: Path, targets: Mapping[str, Sequence[str]], folder: Path) -> Path:
    """A CUDA file compiled by nvcc, into the folder.

    Args:
        targets: for each virtual architecture, such as 100, the real ones that its PTX is
            assembled for. The PTX is most of the work. It is kept, for it says what was planned.

    Raises:
        RuntimeError: it doesn't compile.
    """
    options = [f"-I{CSRC}"]
    for virtual, real in targets.items():
        code = ",".join([f"compute_{virtual}", *(f"sm_{target}" for target in real)])
        options.append(f"-gencode=arch=compute_{virtual},code=[{code}]")
    binary = folder / f"{source.stem}.fatbin"
    command = ["nvcc", "-std=c++17", "-O3", "-fatbin", *options, str(source), "-o", str(binary)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{source.name}: {result.stderr}")
    return binary


def ptx_version(binary: Path) -> str:
    """The version of PTX in a library, which tells nvcc's: 9.0 is of CUDA 13.0."""
    versions = (line.split()[-1] for line in _dump(binary, "-ptx") if line.startswith(".version"))
    return max(versions)


def read_kernels(
    binary: Path, wanted: str = "", arch: str = "", code: bool = True
) -> list[CompiledKernel]:
    """The kernels in a library, on every architecture it has machine code for.

    Args:
        wanted: a regular expression that is found in the readable names of those to read.
        arch: the one architecture to read, such as sm_90a; all of them if empty.
        code: with their machine code, which takes most of the time.
    """
    every = [kernel for kernel in _resources(binary) if arch in ("", kernel.arch)]
    readable = _demangled([kernel.name for kernel in every])
    kernels = [kernel for kernel in every if re.search(wanted, readable[kernel.name])]
    if not kernels:
        return []
    plans = dict(_plans(binary))
    names = {kernel.name for kernel in kernels} if wanted else set()
    listings = {
        (one, name): instructions
        for one in ({kernel.arch for kernel in kernels} if code else ())
        for name, instructions in _machine_code(binary, one, names).items()
    }
    for kernel in kernels:
        if code:
            kernel.code = listings[kernel.arch, kernel.name]
        kernel.threads, kernel.resident_blocks = plans.get(kernel.name, (0, 0))
        kernel.name = readable[kernel.name]
    return kernels


def _dump(binary: Path, what: str, *options: str) -> Iterator[str]:
    tool = cuobjdump()
    assert tool is not None
    command = [tool, what, *options, str(binary)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0, command


def _resources(binary: Path) -> Iterator[CompiledKernel]:
    arch = name = ""
    for line in _dump(binary, "-res-usage"):
        if line.startswith("arch = "):
            arch = line.split()[-1]
        elif match := re.match(r" Function (\S+):$", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            yield CompiledKernel(name, arch, registers, stack + local, shared)


def _machine_code(
    binary: Path, arch: str, names: Iterable[str] = ()
) -> dict[str, list[Instruction]]:
    """By mangled name, of all kernels where none are named."""
    listed = ",".join(names)
    options = ["-arch", arch, *(["-fun", listed] if listed else [])]
    return parse(_dump(binary, "-sass", *options))


def _plans(binary: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """By kernel, threads of a block and blocks of a multiprocessor."""
    name, threads = "", 0
    for line in _dump(binary, "-ptx"):
        if match := re.search(r"\.entry (\w+)", line):
            name, threads = match[1], 0
        elif match := re.match(r"\.maxntid (\d+)", line):
            threads = int(match[1])
            yield name, (threads, 1)
        elif match := re.match(r"\.minnctapersm (\d+)", line):
            yield name, (threads, int(match[1]))


def _demangled(names: list[str]) -> dict[str, str]:
    result = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    plain = (
        line.replace("encoder_fast::", "").replace("(anonymous namespace)::", "")
        for line in result.stdout.splitlines()
    )
    return dict(zip(names, plain, strict=True))
