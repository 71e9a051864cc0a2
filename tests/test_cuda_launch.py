"""How csrc/launch.cuh asks the CUDA runtime for a launch.

The emulation has another body for it, so no other test without a GPU comes here. nvcc compiles it
as it does for a card; the runtime that it is linked with notes what it is asked
(tests/cuda_host/launches.cu).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

# cudaFuncAttributeMaxDynamicSharedMemorySize
DYNAMIC_SHARED_MEMORY = 8


class Launcher:
    """csrc/launch.cuh over a runtime that launches nothing."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.asked.restype = self._library.start.restype = ctypes.c_char_p

    def start(
        self,
        blocks: int = 5,
        threads: int = 128,
        shared_bytes: int = 0,
        device: int = 0,
        stream: int = 0,
    ) -> str:
        """The error, or nothing."""
        sizes = ctypes.c_int64(blocks), threads, ctypes.c_size_t(shared_bytes)
        return self._library.start(*sizes, device, ctypes.c_ssize_t(stream)).decode()

    def asked(self) -> list[str]:
        """The calls of the runtime since the last time, without those that only look."""
        calls = self._library.asked().decode().splitlines()
        return [call for call in calls if "Get" not in call]

    def refuse(self, function: str) -> None:
        self._library.refuse(function.encode())

    def multiprocessors(self) -> int:
        return self._library.multiprocessors()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    library = tmp_path_factory.mktemp("launches") / "launches.so"
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-cudart=none", "-shared", "-Xcompiler=-fPIC"]
    # Where there is a GPU, PyTorch has brought in a runtime too.
    command += [
        "-Xlinker=-Bsymbolic",
        f"-I{ROOT / 'csrc'}",
        str(ROOT / "tests/cuda_host/launches.cu"),
    ]
    result = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Launcher(library)


def test_a_launch(launcher: Launcher) -> None:
    launcher.asked()
    assert launcher.start(blocks=2**31 - 1, threads=96, shared_bytes=32, stream=77) == ""
    assert launcher.asked() == [
        "cudaLaunchKernel(2147483647x1, 96x1, 32, 77, 7, 2.500000, device 0)"
    ]


@pytest.mark.parametrize("shared_bytes", (48 * 1024, 48 * 1024 + 16, 99 * 1024))
def test_more_shared_memory_than_a_block_has_is_asked_for(
    launcher: Launcher, shared_bytes: int
) -> None:
    launcher.asked()
    assert launcher.start(shared_bytes=shared_bytes) == ""
    wanted = f"cudaFuncSetAttribute({DYNAMIC_SHARED_MEMORY}, {shared_bytes})"
    asked = launcher.asked()
    assert asked[:-1] == ([wanted] if shared_bytes > 48 * 1024 else [])
    assert f", {shared_bytes}, " in asked[-1]


def test_the_operands_device_is_current_for_the_launch_alone(launcher: Launcher) -> None:
    launcher.asked()
    assert launcher.start(device=3) == ""
    first, launch, last = launcher.asked()
    assert (first, last) == ("cudaSetDevice(3)", "cudaSetDevice(0)")
    assert launch.endswith("device 3)")
    # -1 leaves the device as it is.
    assert launcher.start(device=-1) == ""
    assert len(launcher.asked()) == 1
    # Where a launch fails, the device comes back too.
    launcher.refuse("cudaLaunchKernel")
    assert launcher.start(device=3) != ""
    assert launcher.asked()[-1] == "cudaSetDevice(0)"


@pytest.mark.parametrize(
    "function", ("cudaGetDevice", "cudaSetDevice", "cudaFuncSetAttribute", "cudaLaunchKernel")
)
def test_a_refusal_is_an_error_once(launcher: Launcher, function: str) -> None:
    launcher.refuse(function)
    message = launcher.start(shared_bytes=64 * 1024, device=1)
    assert message.endswith(": cudaErrorOfATest: as the test has it")
    if function in ("cudaFuncSetAttribute", "cudaLaunchKernel"):
        assert message.startswith("an op of (7, 2): ")
    # The runtime goes on telling it to those who ask for its last error. The next launch is well.
    assert launcher.start() == ""


def test_a_grid_that_is_too_large(launcher: Launcher) -> None:
    launcher.asked()
    assert "more blocks than a grid may have" in launcher.start(blocks=2**31)
    assert launcher.asked() == []


def test_the_multiprocessors_are_those_of_the_current_device(launcher: Launcher) -> None:
    assert launcher.multiprocessors() == 132
