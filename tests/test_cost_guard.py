"""The main kernels take no more of a card than bench/cost/costs.json says they did.

After a change that is meant to cost more, or that costs less, `make cost` records anew.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cost import record
from bench.cost.cases import cuda_cases, triton_cases
from bench.cost.cuda_binary import cuobjdump, extension, read_kernels
from bench.cost.measure import Cost, cuda_costs, triton_costs
from bench.cost.run import compilers

ARCH = 90
RECORDED_BY, RECORDED = record.read()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is needed"),
]


def skip_other_compiler(name: str) -> None:
    here = compilers().get(name)
    if here != RECORDED_BY[name]:
        pytest.skip(f"counts are recorded for {name} {RECORDED_BY[name]}, here it is {here}")


def wrong(costs: list[Cost]) -> list[str]:
    return [
        f"{cost.case.key}: {line}"
        for cost in costs
        for line in record.regressions(cost, RECORDED[cost.case.key, cost.arch])
    ]


@pytest.fixture(scope="module")
def triton() -> list[Cost]:
    skip_other_compiler("Triton")
    return triton_costs([case for case in triton_cases() if case.guarded], [ARCH])


@pytest.fixture(scope="module")
def cuda() -> list[Cost]:
    built = extension()
    if built is None:
        pytest.skip("the extension encoder_fast._cuda is not built")
    skip_other_compiler("nvcc's PTX")
    cases = [case for case in cuda_cases() if case.guarded]
    patterns = "|".join(case.pattern for case in cases)
    return cuda_costs(cases, read_kernels(built, patterns, "sm_90a"))


def test_triton_kernels_take_no_more_than_recorded(triton: list[Cost]) -> None:
    assert len(triton) >= 8
    assert not wrong(triton), "\n".join(wrong(triton))


def test_cuda_kernels_take_no_more_than_recorded(cuda: list[Cost]) -> None:
    assert len(cuda) >= 8
    assert not wrong(cuda), "\n".join(wrong(cuda))


def test_what_got_worse_is_named(cuda: list[Cost]) -> None:
    cost = next(cost for cost in cuda if cost.case.name == "attention D=64, a loop")
    entry = RECORDED[cost.case.key, ARCH]
    assert record.regressions(cost, entry) == []
    step = cost.analysis.step
    assert step is not None
    more = replace(step, barriers=step.barriers + 1, shared_bytes=step.shared_bytes + 512)
    slower = replace(step, issue=2 * step.issue)
    for worse, named in (
        (replace(cost, analysis=replace(cost.analysis, barriers=2)), "barriers"),
        (replace(cost, analysis=replace(cost.analysis, step=more)), "shared_bytes step"),
        (replace(cost, analysis=replace(cost.analysis, step=slower)), "clocks step"),
        (replace(cost, spills_bytes=8), "spills_bytes"),
        (replace(cost, resident=1), "resident blocks"),
    ):
        assert any(named in line for line in record.regressions(worse, entry)), named
