"""Runs the tests that matter on a GPU, those that tell most first.

    python tests/on_gpu.py                       # all of them; `make test-gpu`
    python tests/on_gpu.py kernels -k attention  # a group, and arguments for pytest

A worker for each core, less two for what Triton starts beside them. Compiling kernels is most of
the time, so a worker that has nothing left takes tests from another. Tests that need gigabytes run
one by one at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Group:
    """Files whose every test runs on the card, and files of which those marked `gpu` do."""

    whole: tuple[str, ...] = ()
    marked: tuple[str, ...] = ()


# In the order of the run.
GROUPS = {
    "kernels": Group(
        marked=("test_on_gpu",),
        whole=(
            "test_kernel_attention",
            "test_cuda_attention",
            "test_kernel_add_layer_norm",
            "test_kernel_embed_layer_norm",
            "test_kernel_disentangled",
            "test_kernel_attention_options",
            "test_minus_infinity",
            "test_kernel_pack_mask",
            "test_kernel_gated",
            "test_kernel_rotary",
            "test_cuda_backend",
            "test_cuda_refusals",
            "test_ops",
            "test_disentangled_attention",
        ),
    ),
    "models": Group(
        whole=(
            "test_parity_bert",
            "test_families",
            "test_deberta",
            "test_modernbert",
            "test_first_token",
        ),
    ),
    "graphs": Group(
        marked=(
            "test_recorder",
            "test_graphs",
            "test_graph_premises",
            "test_attention_memory",
            "test_packing",
            "test_patching",
            "test_weights",
        ),
    ),
}
WHOLE_FILES = frozenset(name for group in GROUPS.values() for name in group.whole)

TEST_SECONDS = 60
"""Limit of a test. The slowest compiles some kernels, of 1 to 3 seconds each."""

_Item = TypeVar("_Item")


def workers() -> int:
    return max(1, len(os.sched_getaffinity(0)) - 2)


def memory_share(workers: int) -> float:
    """How much of a card's memory one of so many workers may hold.

    A context takes about 1% of an 80 GiB card, outside of what PyTorch counts.
    """
    return (1 - 0.01 * workers) * 0.95 / workers


def dealt(items: Sequence[_Item], workers: int) -> list[_Item]:
    """The order by which each worker begins with the first of `items`.

    pytest-xdist's work stealing cuts the list into runs of equal length, a run a worker, and the
    longer runs are its last.
    """
    return [item for first in reversed(range(workers)) for item in items[first::workers]]


def pytest_commands(groups: Sequence[str], arguments: Sequence[str]) -> dict[str, list[str]]:
    """In workers first, then one by one what needs a worker's memory many times, if there is any:
    to start pytest and collect takes 10 seconds."""
    names = [name for group in groups for name in (*GROUPS[group].marked, *GROUPS[group].whole)]
    files = [str(TESTS / f"{name}.py") for name in names]
    common = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "on_gpu_plugin"]
    common += ["--tb=short"]
    if find_spec("pytest_timeout"):
        # Nothing but the end of the process stops a kernel that hangs; a new worker goes on. Where
        # the test stood is printed a little earlier, for a worker that ends prints nothing.
        common += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
        common += ["-o", f"faulthandler_timeout={TEST_SECONDS - 5}"]
    parallel = []
    if find_spec("xdist"):
        stealing = find_spec("xdist.scheduler.worksteal") is not None
        parallel = [f"-n{workers()}", "--dist", "worksteal" if stealing else "load"]
    large = [file for file in files if ".large_memory" in Path(file).read_text("utf-8")]
    commands = {
        "in workers": [*common, *parallel, "-m", "gpu and not large_memory", *arguments, *files]
    }
    if large:
        commands["one by one"] = [*common, "-m", "gpu and large_memory", *arguments, *large]
    return commands


def main() -> int:
    words = sys.argv[1:]
    groups = [word for word in words if word in GROUPS] or list(GROUPS)
    commands = pytest_commands(groups, [word for word in words if word not in GROUPS])
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    ends = {}
    for name, command in commands.items():
        process = subprocess.Popen(command, env=environment)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it was told too, and sums up
            return 130
        # 5: none was selected
        ends[name] = 0 if status == 5 else status
    told = {0: "all passed", 1: "some failed"}
    print("; ".join(f"{name}: {told.get(end, f'status {end}')}" for name, end in ends.items()))
    # A signal's number is below 0.
    return next((abs(end) for end in ends.values() if end), 0)


if __name__ == "__main__":
    sys.exit(main())
