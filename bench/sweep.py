"""Every kernel over the shapes that matter: errors beside eager's, and our backends' times alone.

It needs no peers and compiles little, so that it says in under a minute whether a card computes
what the emulation does, and where times are off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch

from bench.contestant import first_line
from bench.machine import Machine
from bench.op_case import WIDTHS, Inputs, OpCase, to_double
from bench.ops import OPS
from bench.suites.kernels import input_sets
from bench.timing import Limits, race_kernels
from bench.workloads import Workload
from encoder_fast.parity import compare

_TOKENS = 16384


def cases(machine: Machine, check: bool) -> Iterator[OpCase]:
    """The cases, those that matter most first; with ``check`` each kernel once or twice, small."""
    half = torch.float16
    if machine.is_fake:
        for op in ("attention", "add_layer_norm"):
            yield OpCase(op, WIDTHS["tiny"], Workload("half", 3, 17), torch.float32)
        return
    if check:
        # Lengths from a few to the longest: tiles that end within a text, and each length class.
        for width, longest in product(("base", "minilm", "wide"), (32, 64, 128, 256, 300)):
            yield OpCase("attention", WIDTHS[width], Workload("half", 3, longest), half)
        for width, longest in product(("base", "minilm"), (64, 300)):
            batch = Workload("half", 3, longest)
            yield OpCase("disentangled_attention", WIDTHS[width], batch, half)
        for op in ("add_layer_norm", "embed_layer_norm", "linear"):
            yield OpCase(op, WIDTHS["base"], Workload("half", 3, 64), half)
        return
    for width, longest in product(("base", "minilm", "wide"), (512, 256, 128)):
        yield OpCase("attention", WIDTHS[width], _full(longest), half)
    for op in ("add_layer_norm", "embed_layer_norm"):
        for width in ("base", "minilm", "large"):
            yield OpCase(op, WIDTHS[width], _full(256), half)
    for longest in (512, 256, 128):
        yield OpCase("disentangled_attention", WIDTHS["base"], _full(longest), half)
    for op in ("linear", "window_attention", "rotary", "gated_feed_forward", "pool"):
        yield OpCase(op, WIDTHS["base"], _full(512), half)
    for width, longest in product(("base", "minilm", "wide"), (1024, 2048, 64, 32)):
        yield OpCase("attention", WIDTHS[width], _full(longest), half)
    yield OpCase("attention", WIDTHS["base"], _full(512), torch.bfloat16)


def _full(longest: int) -> Workload:
    return Workload("full", _TOKENS // longest, longest)


def sweep(
    machine: Machine,
    backends: Sequence[str],
    *,
    check: bool = False,
) -> bool:
    """Run all cases; whether every result kept the parity rule and none failed.

    Args:
        check: small inputs that are run and not timed, for a sanitizer.
    """
    good = True
    for case in cases(machine, check):
        for row in _rows(machine, case, backends, check):
            good = good and row["status"] in ("ok", "skipped")
            print(_told(case, row), flush=True)
        if machine.has_lost_context:
            print("stopped: the CUDA context is lost, and nothing more would run")
            return False
        if machine.is_gpu:
            torch.cuda.empty_cache()
    return good


@torch.inference_mode()
def _rows(
    machine: Machine, case: OpCase, backends: Sequence[str], check: bool
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    op = OPS[case.op]
    sets: list[Inputs] = [op.inputs(case, machine.device)] if check else input_sets(machine, case)
    original, exact = op.eager(sets[0]), op.eager(to_double(sets[0]))
    rows, ready = {}, {}
    for backend in backends:
        try:
            calls = [op.ours(inputs, backend) for inputs in sets]
            found = compare(case.op, calls[0](), original, exact)
        except (ValueError, NotImplementedError) as error:
            rows[backend] = {"backend": backend, "status": "skipped", "reason": first_line(error)}
            continue
        except Exception as error:
            rows[backend] = {"backend": backend, "status": "failed", "reason": first_line(error)}
            continue
        rows[backend] = {
            "backend": backend,
            "status": "ok" if found.ok else "wrong",
            "error": found.error,
            "original_error": found.original_error,
        }
        ready[backend] = calls
    if not check:
        limits = Limits(most=1 if machine.is_fake else 30, fewest=1, seconds=0.15)
        for backend, times in race_kernels(machine, ready, limits).items():
            seconds = times.quantile(0.5)
            rows[backend] |= {
                "seconds": seconds,
                "teraflops": op.operations(case) / seconds / 1e12,
                "gigabytes_a_second": op.moved(case) / seconds / 1e9,
            }
    return list(rows.values())


def _told(case: OpCase, row: dict[str, Any]) -> str:
    text = f"{case.name} {row['backend']}: {row['status']}"
    if "reason" in row:
        return f"{text}, {row['reason']}"
    text += f", error {row['error']:.1e}, eager's {row['original_error']:.1e}"
    if "seconds" in row:
        text += (
            f", {row['seconds'] * 1e6:.1f} us, {row['teraflops']:.0f} TFLOP/s, "
            f"{row['gigabytes_a_second']:.0f} GB/s"
        )
    return text
