"""What is launched to read a mask, compiled for cards that are not there."""

from __future__ import annotations

import pytest
import torch

from bench.cost.triton_compile import (
    ARCHS,
    CompiledKernel,
    LauncherCall,
    compile_launches,
    problems,
)
from encoder_fast.kernels.pack_mask import count_tokens, place_tokens

# Tokenizers give int64. The others differ in how a value is read and compared.
OTHER_TYPES = ("int32", "bool", "float32", "float16", "bfloat16")


def launch() -> None:
    for dtype in ("int64", *OTHER_TYPES):
        # By its name: types are no JSON.
        mask = torch.empty(6, 192, dtype=getattr(torch, dtype))
        ids = torch.empty(mask.shape, dtype=torch.int64)
        lengths = torch.empty(len(mask), dtype=torch.int32)
        headless = torch.empty(len(mask), dtype=torch.bool)
        count_tokens(mask, ids, 30522, True)
        place_tokens(mask, lengths, headless, 16, 2)
        if dtype == "int64":
            count_tokens(mask, ids, 30522, False)
            count_tokens(mask, ids.int(), 30522, True)
            count_tokens(mask, ids.int(), 30522, False)
            count_tokens(mask, None, 0, True)
            place_tokens(mask, lengths, headless, 16, 0)


@pytest.fixture(scope="module")
def launches() -> list[CompiledKernel]:
    return compile_launches([LauncherCall("test_compile_pack_mask:launch", {}, a) for a in ARCHS])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids="sm_{}".format)
def test_launches_fit_the_card(launches: list[CompiledKernel], arch: int) -> None:
    here = [kernel for kernel in launches if kernel.arch == arch]
    wrong = [f"{kernel}: {line}" for kernel in here for line in problems(kernel, 16)]
    assert not wrong, "\n".join(wrong)
    assert len(here) == 7 + 2 * len(OTHER_TYPES)
