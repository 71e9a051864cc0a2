"""Launch Triton kernels for cards that are not there, and read what the compiled code needs.

Triton compiles for any target it is told, so a machine without a GPU can still prove that a launch
configuration fits a card: registers without spills, shared memory within the block's limit, tensor
core instructions in the PTX. What is compiled is what a launcher of the package launches, found out
by calling it: no test says once more which tile, types or alignments a kernel gets.

    calls = [LauncherCall("test_compile_norms:launch_norms", {"dtype": "float16"}, arch=90)]
    for kernel in compile_launches(calls):
        assert problems(kernel) == []

The function that a call names is run in a Python process of its own, for a kernel decorated while
`TRITON_INTERPRET=1` is an interpreted function and cannot be compiled. There Triton's driver is one
for a card of that architecture which launches nothing. The calls go over as JSON and the kernels,
each once, come back as JSON.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHS = (80, 89, 90, 100)

# What differs between fp16 and bf16 is the instruction that converts: one of them on an
# architecture, each on an older and a newer one, shows as much as both on all.
HALF_ON = {80: "fp16", 89: "bf16", 90: "fp16", 100: "bf16"}

# The most shared memory one block may ask for, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

REGISTER_LIMIT = 255

# Launch configurations were chosen with this release, and there nothing may spill. In others ptxas
# saves a few registers of one configuration or another to get one more block on a multiprocessor:
# no choice of tiles is free of that in all of 3.4, 3.6 and 3.9.
STRICT_TRITON = "3.6."


@dataclass(frozen=True)
class LauncherCall:
    """A function that calls launchers, as "module:function", its arguments, and for which card."""

    function: str
    arguments: dict[str, Any]
    arch: int


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel as a launcher had it compiled; `error` alone is set when the call raised.

    A type in `types` ends in ":16" where Triton was told of a pointer aligned to 16 bytes or of an
    integer divisible by 16. Among `constants` are the arguments that are None or 1. `cubin` is in
    base 64.
    """

    arch: int
    kernel: str = ""
    types: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 0
    num_stages: int = 0
    registers: int = 0
    spills_bytes: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    ptx: str = ""
    cubin: str = ""
    ptxas_log: str = ""
    triton_version: str = ""
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"sm_{self.arch}"
        named = {**self.types, **self.constants}
        told = ", ".join(f"{name}={value}" for name, value in named.items())
        options = f"{self.num_warps} warps, {self.num_stages} stages"
        return f"sm_{self.arch} {self.kernel}({told}), {options}"

    def count(self, pattern: str) -> int:
        """How many times a regular expression occurs in the PTX."""
        return len(re.findall(pattern, self.ptx))

    @property
    def tensor_core_ops(self) -> int:
        """Matrix instructions: mma.sync up to Ada, wgmma on Hopper, tcgen05 on Blackwell."""
        return self.count(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)")

    @property
    def access_bytes(self) -> list[int]:
        """The width of each access to global memory: its bits, in however many registers."""
        found = re.findall(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.b(\d+) ", self.ptx)
        return [int(registers or 1) * int(bits) // 8 for registers, bits in found]


def problems(kernel: CompiledKernel, spills_elsewhere: int = 0) -> list[str]:
    """What keeps a kernel from shipping on its architecture, one readable line each.

    spills_elsewhere: bytes that may spill under another Triton than `STRICT_TRITON`.
    """
    if kernel.error:
        return [f"does not compile: {kernel.error}"]
    found = []
    strict = kernel.triton_version.startswith(STRICT_TRITON)
    if kernel.spills_bytes > (0 if strict else spills_elsewhere):
        found.append(f"spills {kernel.spills_bytes} bytes at {kernel.registers} registers")
    if kernel.stack_bytes and (strict or not kernel.spills_bytes):
        found.append(f"uses {kernel.stack_bytes} bytes of local memory")
    if "Potential Performance Loss" in kernel.ptxas_log:
        found.append(next(x for x in kernel.ptxas_log.splitlines() if "Performance Loss" in x))
    if kernel.shared_bytes > SHARED_LIMIT[kernel.arch]:
        found.append(
            f"wants {kernel.shared_bytes} bytes of shared memory, sm_{kernel.arch} gives a block "
            f"{SHARED_LIMIT[kernel.arch]}"
        )
    if kernel.registers > REGISTER_LIMIT:
        found.append(f"uses {kernel.registers} registers a thread")
    return found


def compile_launches(calls: Sequence[LauncherCall], workers: int = 2) -> list[CompiledKernel]:
    """Every kernel that the calls launch, compiled in `workers` processes without the interpreter.

    A call that raises gives a kernel with `error` set; only a process that dies as a whole raises.
    """
    every = [kernel for kernels in launches_of(calls, workers) for kernel in kernels]
    return list({id(kernel): kernel for kernel in every}.values())


def launches_of(calls: Sequence[LauncherCall], workers: int = 2) -> list[list[CompiledKernel]]:
    """For each call the kernels that it launches, those that an earlier one launched among them."""
    workers = min(workers, len(calls))
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)

        running = []
        for i_worker in range(workers):
            # Striding spreads the dear architectures and shapes evenly over the workers.
            share = [asdict(call) for call in calls[i_worker::workers]]
            file_in, file_out = Path(folder) / f"{i_worker}.in", Path(folder) / f"{i_worker}.out"
            file_in.write_text(json.dumps(share))
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.cost.triton_compile", str(file_in), str(file_out)],
                # What comes out of a cache has no assembler's log: none that others fill.
                env={**environment, "TRITON_CACHE_DIR": str(Path(folder) / f"{i_worker}.cache")},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            running.append((process, file_out))

        logs = [process.communicate()[0] for process, _ in running]
        found: list[list[CompiledKernel]] = [[] for _ in calls]
        for i_worker, ((process, file_out), log) in enumerate(zip(running, logs, strict=True)):
            if process.returncode != 0:
                raise RuntimeError(f"compile process ended with {process.returncode}:\n{log}")
            said = json.loads(file_out.read_text())
            kernels = [CompiledKernel(**fields) for fields in said["kernels"]]
            found[i_worker::workers] = [[kernels[i] for i in call] for call in said["calls"]]
    return found


@contextmanager
def absent_card(arch: int, compiled: list[CompiledKernel]) -> Iterator[list[int]]:
    """Within the block, launches compile for a card of `arch`, and are noted instead of run.

    What was not compiled before is added to `compiled`. The list that the block gets says where
    among those each launched kernel is.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from encoder_fast.kernels import attention, disentangled_attention, local_attention

    class AbsentCard:
        """What a launch asks of Triton's driver up to where the compiled code would be loaded."""

        def get_current_device(self) -> int:
            return arch  # the key of each kernel's cache of compiled code

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    launched: list[int] = []
    logs: list[str] = []
    launch, run_process = triton.JITFunction.run, subprocess.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        logs.clear()
        code = launch(kernel, *args, grid=grid, warmup=True, **options)
        if logs:  # else it was compiled before
            code.place_among_compiled = len(compiled)
            compiled.append(_read(kernel, code, arch, logs[-1]))
        if code.place_among_compiled not in launched:
            launched.append(code.place_among_compiled)
        return code

    def run_logged(command: Any, **options: Any) -> Any:
        # Triton asks its assembler to be verbose, and deletes what it says.
        done = run_process(command, **options)
        if any(str(word).startswith("--gpu-name") for word in command):
            logs.append(Path(options["stderr"].name).read_text())
        return done

    files = attention, disentangled_attention, local_attention
    asked = [file.shared_memory for file in files]
    triton.JITFunction.run, subprocess.run = run, run_logged
    driver.set_active(AbsentCard())
    for file in files:
        file.shared_memory = lambda device: SHARED_LIMIT[arch]
    try:
        yield launched
    finally:
        triton.JITFunction.run, subprocess.run = launch, run_process
        for file, function in zip(files, asked, strict=True):
            file.shared_memory = function


def _read(kernel: Any, code: Any, arch: int, log: str) -> CompiledKernel:
    import triton

    names, source = kernel.arg_names, code.src
    divisible = {names[path[0]] for path, attribute in source.attrs.items() if attribute}
    return CompiledKernel(
        arch=arch,
        kernel=kernel.__name__,
        types={
            name: type_ + ":16" * (name in divisible)
            for name, type_ in source.signature.items()
            if type_ != "constexpr"
        },
        constants={names[path[0]]: value for path, value in source.constants.items()},
        num_warps=code.metadata.num_warps,
        num_stages=code.metadata.num_stages,
        registers=max(_numbers(r"Used (\d+) registers", log)),
        spills_bytes=sum(_numbers(r"(\d+) bytes spill (?:stores|loads)", log)),
        stack_bytes=sum(_numbers(r"(\d+) bytes stack frame", log)),
        shared_bytes=code.metadata.shared,
        ptx=code.asm["ptx"],
        cubin=base64.b64encode(code.asm["cubin"]).decode(),
        ptxas_log=log,
        triton_version=triton.__version__,
    )


def _numbers(pattern: str, log: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, log)]


def _main(file_in: str, file_out: str) -> None:
    kernels: list[CompiledKernel] = []
    calls = []
    for call in json.loads(Path(file_in).read_text()):
        module, _, name = call["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        with absent_card(call["arch"], kernels) as launched:
            try:
                function(**call["arguments"])
            except Exception as error:
                message = f"{call}: {type(error).__name__}: {error}"
                launched.append(len(kernels))
                kernels.append(CompiledKernel(call["arch"], error=message))
        calls.append(launched)
    said = {"kernels": [asdict(kernel) for kernel in kernels], "calls": calls}
    Path(file_out).write_text(json.dumps(said))


if __name__ == "__main__":
    _main(*sys.argv[1:])
