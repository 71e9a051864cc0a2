"""What the device can do at most, measured by what its maker tuned: a copy and square GEMMs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.machine import Machine
from bench.timing import Call, Limits, race_kernels

COPY = "copy"
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def dtype_name(dtype: torch.dtype) -> str:
    return _NAMES[dtype]


def measure_roofs(machine: Machine, seconds: float) -> dict[str, float]:
    """Bytes a second of a copy, and operations a second of a GEMM in each precision.

    The copy counts what it reads and what it writes. ``fp32`` is without TF32; a precision that the
    device does not have is left out.
    """
    calls: dict[str, list[Call]] = {COPY: [_copy(machine)]}
    size = {"gpu": 8192, "cpu": 1536, "fake": 64}[machine.kind]
    for name, build in _MATMULS.items():
        try:
            call = build(machine, size)
            call()
        except (RuntimeError, ValueError, NotImplementedError, AttributeError):
            continue
        calls[name] = [call]
    limits = Limits(most=30, fewest=3, seconds=seconds)
    roofs = {}
    for name, times in race_kernels(machine, calls, limits).items():
        work = 2 * _copy_bytes(machine) if name == COPY else 2 * size**3
        # A roof is the best that was seen: what fell short of it was interrupted.
        roofs[name] = float(f"{work / times.quantile(0.1):.4g}")
    return roofs


def roof_seconds(
    roofs: dict[str, float], name: str, moved: float, operations: float
) -> tuple[float, str] | None:
    """The least time that the roofs allow a kernel, and which of them sets it.

    Args:
        name: the precision, ``fp32`` and so on.

    Returns ``None`` where a roof is not known.
    """
    # tensor cores run float16 and bfloat16 at one rate; a CPU without float16 widens it
    rate = roofs.get(name) or roofs.get({"fp16": "bf16", "bf16": "fp16"}.get(name, ""))
    if COPY not in roofs or not rate:
        return None
    by_memory, by_arithmetic = moved / roofs[COPY], operations / rate
    return max((by_memory, "memory"), (by_arithmetic, "arithmetic"))


def _copy_bytes(machine: Machine) -> int:
    return {"gpu": 2**30, "cpu": 2**27, "fake": 2**16}[machine.kind]


def _copy(machine: Machine) -> Call:
    source = torch.ones(_copy_bytes(machine) // 4, device=machine.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _matmul(dtype: torch.dtype, tf32: bool = False) -> Callable[[Machine, int], Call]:
    def build(machine: Machine, size: int) -> Call:
        if tf32 and not machine.is_gpu:
            raise ValueError("TF32 is a GPU's")
        if dtype not in (torch.float32, *machine.dtypes):
            raise ValueError(f"nobody runs {dtype} here")
        a, b = (torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def call() -> None:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.mm(a, b, out=out)
            torch.set_float32_matmul_precision(before)

        return call

    return build


def _fp8(machine: Machine, size: int) -> Call:
    if not machine.is_gpu:
        raise ValueError("no FP8 without a GPU")
    a = torch.randn(size, size, device=machine.device).to(torch.float8_e4m3fn)
    b = torch.randn(size, size, device=machine.device).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=machine.device)
    return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


_MATMULS: dict[str, Callable[[Machine, int], Call]] = {
    "fp32": _matmul(torch.float32),
    "tf32": _matmul(torch.float32, tf32=True),
    "fp16": _matmul(torch.float16),
    "bf16": _matmul(torch.bfloat16),
    "fp8": _fp8,
}
