"""The measured launch configurations, compiled for the cards they were measured on."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import pytest
from test_compile_attention import PRECISIONS, launch_attention
from test_compile_norms import launch

from bench.cost.triton_compile import HALF_ON, LauncherCall, compile_launches, problems
from encoder_fast.kernels import launch_table

# By the beginning of a card's name; the architecture that its kernels are compiled for.
ARCH_OF = {
    "NVIDIA A100": 80,
    "NVIDIA H100": 90,
    "NVIDIA H200": 90,
    "NVIDIA GH200": 90,
    "NVIDIA B200": 100,
    "NVIDIA L4": 89,
    "NVIDIA L40": 89,
    "NVIDIA GeForce RTX 40": 89,
}

Entries = dict[str, dict[str, dict[str, Any]]]


def launch_entries(entries: Entries, half: str) -> None:
    """What is launched in the shape classes of these entries with the entries in force.

    half: the type that stands for those of 2 bytes.
    """
    with ExitStack() as stack:
        for kernel, classes in entries.items():
            for name, config in classes.items():
                stack.enter_context(launch_table.forced(kernel, name, config))
        for kernel, classes in entries.items():
            for name in classes:
                found = re.match(r"(?:D|N<=)(\d+), (\d) bytes", name)
                assert found is not None, name
                size, itemsize = int(found[1]), int(found[2])
                dtype = "fp32" if itemsize == 4 else half
                if kernel == "attention":
                    for precision in PRECISIONS[dtype]:
                        launch_attention("plain", dtype, precision, size)
                else:
                    launch(size, dtype, "fp32")


def shortcomings(table: dict[str, Entries]) -> list[str]:
    calls = []
    for card, entries in table.items():
        arch = next((arch for name, arch in ARCH_OF.items() if card.startswith(name)), None)
        if arch is None:
            return [f"the architecture of {card!r} is not known here"]
        arguments = {"entries": entries, "half": HALF_ON[arch]}
        calls.append(LauncherCall("test_compile_launch_table:launch_entries", arguments, arch))
    return [f"{kernel}: {line}" for kernel in compile_launches(calls) for line in problems(kernel)]


@pytest.mark.slow
def test_the_shipped_table_fits_its_cards() -> None:
    wrong = shortcomings(launch_table.load())
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_an_entry_that_fits_no_card_is_noticed() -> None:
    too_large = {"block_m": 128, "block_n": 256, "num_warps": 8, "num_stages": 12}
    entries = {"attention": {"D32, 2 bytes, 128 queries, a loop over about 1024 keys": too_large}}
    wrong = shortcomings({"NVIDIA H100 80GB HBM3": entries})
    assert wrong and all("BLOCK_N=256" in line for line in wrong)
    assert shortcomings({"Another card": entries}) == [
        "the architecture of 'Another card' is not known here"
    ]
