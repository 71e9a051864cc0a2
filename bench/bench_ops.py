"""The ops under pytest-benchmark, for a contributor's before and after.

::

    pytest bench --benchmark-only --benchmark-save=before
    pytest bench --benchmark-only --benchmark-compare=0001
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.machine import find_machine
from bench.op_case import WIDTHS, OpCase, to_double
from bench.ops import OPS, facts_of
from bench.roofs import dtype_name
from bench.workloads import Workload
from encoder_fast.parity import compare

MACHINE = find_machine()
WORKLOADS = (Workload("half", 16, 128), Workload("full", 16, 128))


@pytest.mark.parametrize("backend", MACHINE.backends)
@pytest.mark.parametrize("dtype", MACHINE.dtypes, ids=dtype_name)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark: Any, op: str, workload: Workload, dtype: torch.dtype, backend: str) -> None:
    case = OpCase(op, WIDTHS["base"], workload, dtype)
    torch.manual_seed(0)
    with torch.inference_mode():
        inputs = OPS[op].inputs(case, MACHINE.device)
        call = OPS[op].ours(inputs, backend)
        original, exact = OPS[op].eager(inputs), OPS[op].eager(to_double(inputs))
        row = compare(op, call(), original, exact)
        assert row.ok, row

        def run() -> None:
            call()
            MACHINE.synchronize()

        benchmark.extra_info.update(facts_of(case))
        benchmark(run)
