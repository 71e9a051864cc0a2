"""Compile Triton kernels for cards that are not there, and read what they need.

Triton compiles for any target it is told, so a machine without a GPU can still prove that a launch
configuration fits a card: registers without spills, shared memory within the block's limit, tensor
core instructions in the PTX.

A kernel decorated while `TRITON_INTERPRET=1` is an interpreted function and cannot be compiled.
The test process may well run that way, so `compile_cases` starts its own Python processes without
that variable, hands them the cases as JSON and gets the reports back as JSON. `compile_for` is
what runs inside, and can be called directly wherever the interpreter is off.

    CASE = CompileCase(
        name="fp16-D64-sm90",
        kernel="encoder_fast.kernels.attention:attention_kernel",
        signature={"p_q": "*fp16:16", "stride_q_row": "i32:16", "total": "i32", "scale": "fp32"},
        constexprs={"BLOCK_M": 64, "HEAD_DIM": 64},
        num_warps=4, num_stages=2, arch=90,
    )
    report = compile_cases([CASE])["fp16-D64-sm90"]
    assert problems(report, arch=90) == []

A signature names the runtime arguments in Triton's type strings. The suffix `:16` states what the
launcher would find out at run time: a pointer aligned to 16 bytes, or an integer divisible by 16.
An integer that is always 1 belongs in `constexprs`, which is where the launcher would put it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHS = (80, 89, 90, 100)

# The most shared memory one block may ask for, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

REGISTER_LIMIT = 255


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one set of constants for one architecture. Everything in it is JSON."""

    name: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    arch: int


@dataclass(frozen=True)
class CompileReport:
    """What ptxas and Triton say of a compiled kernel; `error` is set when it did not compile."""

    registers: int = 0
    spills_bytes: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    ptx: str = ""
    ptxas_log: str = ""
    triton_version: str = ""
    error: str = ""

    def count(self, pattern: str) -> int:
        """How many times a regular expression occurs in the PTX."""
        return len(re.findall(pattern, self.ptx))

    @property
    def tensor_core_ops(self) -> int:
        """Matrix instructions: mma.sync up to Ada, wgmma on Hopper, tcgen05 on Blackwell."""
        return self.count(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)")


def problems(report: CompileReport, arch: int) -> list[str]:
    """What keeps a report from shipping on this architecture, one readable line each."""
    if report.error:
        return [f"does not compile: {report.error}"]
    found = []
    if report.spills_bytes:
        found.append(f"spills {report.spills_bytes} bytes at {report.registers} registers")
    if report.stack_bytes:
        found.append(f"uses {report.stack_bytes} bytes of local memory")
    if "Potential Performance Loss" in report.ptxas_log:
        found.append(next(x for x in report.ptxas_log.splitlines() if "Performance Loss" in x))
    if report.shared_bytes > SHARED_LIMIT[arch]:
        found.append(
            f"wants {report.shared_bytes} bytes of shared memory, sm_{arch} gives a block "
            f"{SHARED_LIMIT[arch]}"
        )
    if report.registers > REGISTER_LIMIT:
        found.append(f"uses {report.registers} registers a thread")
    return found


def compile_cases(cases: Sequence[CompileCase], workers: int = 2) -> dict[str, CompileReport]:
    """Compile every case in `workers` processes that have the interpreter switched off.

    A case that does not compile gives a report with `error` set; only a process that dies as a
    whole raises.
    """
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"case names must differ, got {sorted(names)}")

    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
        environment.setdefault("TRITON_CACHE_DIR", str(Path(folder) / "cache"))

        running = []
        for i_worker in range(min(workers, len(cases))):
            # Striding spreads the dear architectures and shapes evenly over the workers.
            share = [asdict(case) for case in cases[i_worker::workers]]
            file_in, file_out = Path(folder) / f"{i_worker}.in", Path(folder) / f"{i_worker}.out"
            file_in.write_text(json.dumps(share))
            command = [sys.executable, __file__, str(file_in), str(file_out)]
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            running.append((process, file_out))

        reports = {}
        logs = [process.communicate()[0] for process, _ in running]
        for (process, file_out), log in zip(running, logs, strict=True):
            if process.returncode != 0:
                raise RuntimeError(f"compile process ended with {process.returncode}:\n{log}")
            for name, fields in json.loads(file_out.read_text()).items():
                reports[name] = CompileReport(**fields)
    return {name: reports[name] for name in names}


def compile_for(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    arch: int,
) -> CompileReport:
    """Compile a `JITFunction` in this process, as its launcher would for a card of `arch`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(kernel, "arg_names") or not isinstance(kernel, triton.runtime.JITFunction):
        raise TypeError(f"kernel must be a JITFunction (is TRITON_INTERPRET set?), got {kernel!r}")
    missing = set(kernel.arg_names) ^ (signature.keys() | constexprs.keys())
    if missing or signature.keys() & constexprs.keys():
        raise ValueError(
            f"signature and constexprs must name each argument of {kernel.__name__} once; "
            f"wrong: {sorted(missing | (signature.keys() & constexprs.keys()))}"
        )

    types, attributes = {}, {}
    for i_argument, name in enumerate(kernel.arg_names):
        types[name], _, divisor = signature.get(name, "constexpr").partition(":")
        if divisor == "16":
            attributes[(i_argument,)] = [["tt.divisibility", 16]]
        elif divisor:
            raise ValueError(f"{name} may have the suffix ':16' or none, got {signature[name]!r}")

    source = ASTSource(fn=kernel, signature=types, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    log = _run_ptxas(ptx, arch)
    return CompileReport(
        registers=max(_numbers(r"Used (\d+) registers", log)),
        spills_bytes=sum(_numbers(r"(\d+) bytes spill (?:stores|loads)", log)),
        stack_bytes=sum(_numbers(r"(\d+) bytes stack frame", log)),
        shared_bytes=compiled.metadata.shared,
        ptx=ptx,
        ptxas_log=log,
        triton_version=triton.__version__,
    )


def _run_ptxas(ptx: str, arch: int) -> str:
    """The verbose log of the assembler that Triton itself would use."""
    from triton.backends.nvidia import compiler as nvidia

    # Triton 3.4 has one assembler; later ones choose by architecture.
    takes_arch = inspect.signature(nvidia.get_ptxas).parameters
    ptxas = nvidia.get_ptxas(arch) if takes_arch else nvidia.get_ptxas()
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None, "PTX names its target"
    with tempfile.TemporaryDirectory() as folder:
        file_ptx = Path(folder) / "kernel.ptx"
        file_ptx.write_text(ptx)
        command = [ptxas.path, "-v", "-lineinfo", f"--gpu-name={target[1]}", str(file_ptx)]
        command += ["-o", str(Path(folder) / "kernel.cubin")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _numbers(pattern: str, log: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, log)]


def _load_kernel(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _main(file_in: str, file_out: str) -> None:
    reports = {}
    for case in json.loads(Path(file_in).read_text()):
        name, kernel = case.pop("name"), _load_kernel(case.pop("kernel"))
        try:
            report = compile_for(kernel, **case)
        except Exception as error:
            report = CompileReport(error=f"{type(error).__name__}: {error}")
        reports[name] = asdict(report)
    Path(file_out).write_text(json.dumps(reports))


if __name__ == "__main__":
    _main(*sys.argv[1:])
