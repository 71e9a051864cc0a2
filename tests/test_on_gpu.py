"""The run of the tests on a GPU: what is in it, in which order, and that nothing is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import on_gpu
import pytest
import torch
import zoo
from kernel_backends import kernel_backends

from encoder_fast.backends import why_not
from encoder_fast.kernels.gated import ACTIVATIONS


@pytest.mark.gpu
def test_the_cuda_extension_is_there() -> None:
    """Else everything of it would be skipped, or not be in a grid of backends, in silence."""
    if os.environ.get("ENCODER_FAST_BUILD_CUDA") == "0":
        pytest.skip("ENCODER_FAST_BUILD_CUDA=0")
    assert "cuda" in kernel_backends(), why_not("cuda", torch.device("cuda"))


@pytest.mark.parametrize(("tests", "workers"), [(10, 4), (9, 3), (2, 5), (0, 2), (40, 14)])
def test_each_worker_begins_with_what_tells_most(tests: int, workers: int) -> None:
    order = on_gpu.dealt(range(tests), workers)
    assert sorted(order) == list(range(tests))
    # what pytest-xdist gives to each worker at first
    runs, left = [], list(order)
    for remaining in range(workers, 0, -1):
        size = len(left) // remaining
        runs.append(left[:size])
        del left[:size]
    firsts = sorted(run[0] for run in runs if run)
    assert firsts == list(range(len(firsts)))
    assert all(run == sorted(run) for run in runs)


def test_workers_of_pytest_begin_with_what_tells_most(tmp_path: Path) -> None:
    """By pytest-xdist itself: of six tests, two workers begin with the first two."""
    (tmp_path / "conftest.py").write_text((on_gpu.TESTS / "conftest.py").read_text())
    body = "import time\n" + "".join(f"def test_{i}(): time.sleep(0.2)\n" for i in range(6))
    output = run_tests(tmp_path, body, "-n2", "--dist", "worksteal")
    assert "6 passed" in output, output
    first = {}
    for worker, test in re.findall(r"\[(gw\d)\].*test_(\d)", output):
        first.setdefault(worker, int(test))
    assert sorted(first.values()) == [0, 1]


def run_tests(folder: Path, body: str, *arguments: str) -> str:
    """What pytest says of tests in a folder of their own."""
    (folder / "test_some.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "xdist", *arguments]
    path = f"{folder}{os.pathsep}{on_gpu.TESTS}"
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(folder)],
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout + result.stderr


# In the place of torch: after an illegal access every call fails in that process.
TORCH = """
class cuda:
    lost = False

    def is_available():
        return True

    def synchronize():
        if cuda.lost:
            raise RuntimeError("an illegal memory access was encountered")
"""
BREAKS = """
from torch import cuda

def test_breaks():
    cuda.lost = True
    assert 1 == 2
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_context_costs_one_test(workers: int, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(TORCH)
    later = "".join(f"def test_{i}(): cuda.synchronize()\n" for i in range(8))
    output = run_tests(tmp_path, BREAKS + later, f"-n{workers}", "-p", "on_gpu_plugin")
    # A failure is printed when it happens.
    assert output.index("assert 1 == 2") < output.index("= FAILURES =")
    assert "illegal memory access" not in output
    if workers:
        assert "8 passed" in output, output
        assert re.search(r"worker 'gw0' crashed while running '.*test_breaks'", output)
    else:
        assert "the CUDA context is lost" in output and " passed" not in output, output


def test_workers_leave_memory_for_each_other() -> None:
    for workers in (1, 4, 14, 30):
        contexts = 0.01 * workers
        assert workers * on_gpu.memory_share(workers) + contexts < 1


def test_a_test_that_hangs_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pytest_timeout")
    monkeypatch.setattr(on_gpu, "TEST_SECONDS", 6)
    (tmp_path / "torch.py").write_text(TORCH)
    body = "import time\ndef test_hangs():\n    time.sleep(60)\ndef test_ok(): pass\n"
    command = on_gpu.pytest_commands([], [])["in workers"]
    limits = command[command.index("--tb=short") + 1 : command.index(f"-n{on_gpu.workers()}")]
    output = run_tests(tmp_path, body, "-n1", "-p", "pytest_timeout", *limits)
    assert "1 failed, 1 passed" in output, output
    assert re.search(r"test_some.py\D+line 3 in test_hangs", output), output
    assert re.search(r"worker 'gw0' crashed while running '.*test_hangs'", output)


def test_the_last_line_tells_of_both_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that crashes alone has failed too."""
    commands = {"in workers": ["true"], "one by one": ["sh", "-c", "kill -SEGV $$"]}
    monkeypatch.setattr(on_gpu, "pytest_commands", lambda *_: commands)
    monkeypatch.setattr(sys, "argv", ["on_gpu.py"])
    assert on_gpu.main() == 11
    assert capsys.readouterr().out == "in workers: all passed; one by one: status -11\n"


def test_only_files_with_large_tests_are_collected_again() -> None:
    commands = on_gpu.pytest_commands(["kernels"], [])
    files = [word for word in commands["one by one"] if word.endswith(".py")]
    assert files and len(files) < len(on_gpu.GROUPS["kernels"].whole)
    assert all("@pytest.mark.large_memory" in Path(file).read_text() for file in files)
    assert list(on_gpu.pytest_commands(["models"], [])) == ["in workers"]


def test_files_that_are_named_exist() -> None:
    for group in on_gpu.GROUPS.values():
        for name in (*group.whole, *group.marked):
            assert (on_gpu.TESTS / f"{name}.py").is_file(), name


@pytest.fixture(scope="module")
def selected() -> list[str]:
    """The tests of the whole run as a machine with an H100 would collect them."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is used, not faked")
    arguments = ["--collect-only", "-q", "-n0", "-m", "gpu"]
    command = on_gpu.pytest_commands(list(on_gpu.GROUPS), arguments)["in workers"]
    return [line for line in on_a_faked_card(command).splitlines() if "::" in line]


def on_a_faked_card(command: list[str], **environment: str) -> str:
    """What pytest says there."""
    path = f"{on_gpu.TESTS}{os.pathsep}{on_gpu.TESTS.parent}"
    result = subprocess.run(
        [*command[:3], "-p", "faked_gpu", *command[3:]],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_what_a_card_would_run(selected: list[str]) -> None:
    files = {
        line.partition("::")[0].removeprefix("tests/").removesuffix(".py") for line in selected
    }
    named = {name for group in on_gpu.GROUPS.values() for name in (*group.whole, *group.marked)}
    assert files == named
    for elsewhere in ("compile", "packaging", "bench", "docs", "cli", "readme"):
        assert not [name for name in files if elsewhere in name]
    assert 3000 < len(selected) < 6000
    assert selected[0].endswith("test_the_cuda_extension_is_there")


def test_every_family_would_run_on_both_backends(selected: list[str]) -> None:
    for family in zoo.FAMILIES:
        for backend in ("triton", "cuda"):
            start = f"tests/test_families.py::test_parity[{backend}-{family}-"
            assert any(line.startswith(start) for line in selected), start


def test_what_triton_would_compile_is_counted() -> None:
    """One file's kernels for each activation and dtype: no launch is missed, none counts twice."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is used, not faked")
    file = str(on_gpu.TESTS / "test_kernel_gated.py")
    command = [sys.executable, "-m", "pytest", "-q", "--assert=plain", "-p", "no:cacheprovider"]
    output = on_a_faked_card([*command, file], PYTHONOPTIMIZE="1", TRITON_INTERPRET="0")
    (count,) = re.findall(r"together: (\d+) kernels of Triton", output)
    assert len(ACTIVATIONS) * 3 <= int(count) <= 20


def test_no_file_of_kernels_is_forgotten() -> None:
    kernels = {path.stem for path in on_gpu.TESTS.glob("test_kernel_*.py")}
    # arithmetic of the host alone, and launches in the interpreter
    elsewhere = {"test_kernel_integers", "test_kernel_interleaving", "test_kernel_far_rows"}
    assert kernels - elsewhere <= on_gpu.WHOLE_FILES


def test_no_file_with_marked_tests_is_forgotten() -> None:
    marked = {
        path.stem for path in on_gpu.TESTS.glob("test_*.py") if ".mark.gpu" in path.read_text()
    }
    named = {name for group in on_gpu.GROUPS.values() for name in group.marked}
    assert marked <= named | on_gpu.WHOLE_FILES
