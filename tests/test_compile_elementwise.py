"""What the launchers of the elementwise kernels launch, compiled for cards that are not there."""

from __future__ import annotations

import pytest
import torch

from bench.cost.triton_compile import (
    ARCHS,
    HALF_ON,
    CompiledKernel,
    LauncherCall,
    compile_launches,
    problems,
)
from encoder_fast.kernels.gated import ACTIVATIONS, gated
from encoder_fast.kernels.rotary import rotary

HEAD_DIMS = (16, 32, 64, 96, 128)

# ModernBERT-base and -large; the second is no multiple of the tile.
GATED_WIDTHS = (1152, 2624)


def launch(dtypes: list[str]) -> None:
    for dtype in (getattr(torch, name) for name in dtypes):
        for head_dim in HEAD_DIMS:
            angles = torch.empty(100, head_dim // 2)
            rotary(torch.empty(100, 3, 12, head_dim, dtype=dtype), angles, angles)
        for width in GATED_WIDTHS:
            gated(torch.empty(100, 2 * width, dtype=dtype), "gelu")
        for activation in ACTIVATIONS:
            gated(torch.empty(100, 2 * GATED_WIDTHS[0], dtype=dtype), activation)


@pytest.fixture(scope="module")
def launches() -> list[CompiledKernel]:
    names = {"fp16": "float16", "bf16": "bfloat16"}
    return compile_launches(
        [
            LauncherCall(
                "test_compile_elementwise:launch", {"dtypes": [names[HALF_ON[a]], "float32"]}, a
            )
            for a in ARCHS
        ]
    )


def shortcomings(kernel: CompiledKernel) -> list[str]:
    found = problems(kernel)
    narrow = [width for width in kernel.access_bytes if width < 16]
    if not kernel.access_bytes or narrow:
        found.append(
            f"{len(narrow)} of {len(kernel.access_bytes)} accesses are narrower than 16 bytes"
        )
    if kernel.shared_bytes or "bar.sync" in kernel.ptx:
        found.append("threads wait for one another")
    if kernel.registers > 64:
        found.append(f"uses {kernel.registers} registers, 64 leave room for 32 warps")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids="sm_{}".format)
def test_launches_fit_the_card(launches: list[CompiledKernel], arch: int) -> None:
    here = [kernel for kernel in launches if kernel.arch == arch]
    wrong = [f"{kernel}: {line}" for kernel in here for line in shortcomings(kernel)]
    assert not wrong, "\n".join(wrong)
    # GELU at the first width is among the activations.
    assert len(here) == 2 * (len(HEAD_DIMS) + len(GATED_WIDTHS) + len(ACTIVATIONS) - 1)
