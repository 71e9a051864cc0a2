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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REGISTERS = 64 * 1024
"""Of a multiprocessor, on every architecture from sm_80 on."""

# The system's own share of a block's shared memory, which sm_90 and later list as static.
SYSTEM_SHARED = 1024


@dataclass
class CompiledKernel:
    """One kernel on one architecture. `instructions` counts mnemonics with their modifiers."""

    name: str
    arch: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int = 0
    resident_blocks: int = 0
    instructions: Counter[str] = field(default_factory=Counter)

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
        hopper_or_later = int(re.sub(r"\D", "", self.arch)) >= 90
        if self.shared_bytes > (SYSTEM_SHARED if hopper_or_later else 0):
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


def read_kernels(binary: Path) -> list[CompiledKernel]:
    """Every kernel in a library, on every architecture it has machine code for."""
    plans = dict(_plans(binary))
    kernels = list(_resources(binary))
    by_key = {(kernel.arch, kernel.name): kernel for kernel in kernels}
    for arch, name, mnemonic in _machine_code(binary):
        by_key[arch, name].instructions[mnemonic] += 1
    readable = _demangled([kernel.name for kernel in kernels])
    for kernel in kernels:
        kernel.threads, kernel.resident_blocks = plans.get(kernel.name, (0, 0))
        kernel.name = readable[kernel.name]
    return kernels


def _dump(binary: Path, what: str) -> Iterator[str]:
    tool = cuobjdump()
    assert tool is not None
    command = [tool, what, str(binary)]
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


def _machine_code(binary: Path) -> Iterator[tuple[str, str, str]]:
    arch = name = ""
    instruction = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
    for line in _dump(binary, "-sass"):
        if match := instruction.match(line):
            yield arch, name, match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
        elif line.startswith("arch = "):
            arch = line.split()[-1]


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
