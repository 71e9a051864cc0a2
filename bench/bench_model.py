"""A small model under pytest-benchmark: patched, and as transformers runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.machine import find_machine
from bench.model_peers import contestants
from bench.models import SIZES, ModelCase, inputs_of
from bench.roofs import dtype_name
from bench.suites.models import Check
from bench.workloads import Workload

MACHINE = find_machine()
WORKLOADS = (Workload("half", 16, 64), Workload("full", 16, 64))


@pytest.mark.parametrize("who", ["encoder_fast", "Hugging Face SDPA"])
@pytest.mark.parametrize("dtype", MACHINE.dtypes, ids=dtype_name)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_minilm(benchmark: Any, workload: Workload, dtype: torch.dtype, who: str) -> None:
    case = ModelCase(SIZES["MiniLM-L6"], workload, dtype)
    peer = next(peer for peer in contestants(MACHINE, case) if peer.label == who)
    inputs = inputs_of(case, MACHINE)
    with torch.inference_mode():
        forward = peer.build(MACHINE, case, inputs)
        row = Check(MACHINE, case, inputs)(forward(inputs))
        assert row.ok, row

        def run() -> None:
            forward(inputs)
            MACHINE.synchronize()

        benchmark.extra_info.update(case.facts(MACHINE))
        benchmark(run)
