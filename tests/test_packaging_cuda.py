"""What becomes of the CUDA extension when the package is built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_packaging import build_tools, python, run, source, succeed

pytestmark = pytest.mark.slow

__all__ = ["build_tools", "source"]  # fixtures

# An extension that compiles in seconds: a launcher, and bindings that know it by its declaration.
KERNEL = """
#include <cuda_runtime.h>
__global__ void kernel(int* out) { if (out) *out = 1; }
int launch() { kernel<<<1, 1>>>(nullptr); return cudaGetLastError(); }
"""
BINDINGS = """
#include <pybind11/pybind11.h>
int launch();
PYBIND11_MODULE(_cuda, m) { m.def("launch", launch); }
"""

# Runs setup.py with these words in the place of its arguments, and no nvcc to be found.
SETUP_WITHOUT_NVCC = """
import shutil, sys
which = shutil.which
shutil.which = lambda name, *rest: None if name.endswith("nvcc") else which(name, *rest)
sys.argv = ["setup.py", "--quiet", "bdist_wheel"]
exec(open("setup.py").read())
"""


@pytest.fixture(scope="module")
def small(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with a smaller extension."""
    copy = tmp_path_factory.mktemp("small") / "source"
    shutil.copytree(source, copy, symlinks=True)
    shutil.rmtree(copy / "csrc")
    (copy / "csrc/folder").mkdir(parents=True)
    (copy / "csrc/folder/kernel.cu").write_text(KERNEL)
    (copy / "csrc/bindings.cpp").write_text(BINDINGS)
    return copy


def wheels(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.whl")]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_a_wheel_with_the_extension(small: Path, build_tools: None, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path]
    environment = {"ENCODER_FAST_BUILD_CUDA": "1", "ENCODER_FAST_CUDA_ARCHS": "80;89, 120"}
    log = succeed(run([*build, small], small, **environment))
    for arch in (80, 89, 120):
        assert f"arch=compute_{arch},code=sm_{arch}" in log
    assert "arch=compute_80,code=compute_80" in log, "later GPUs have nothing to run"

    (wheel,) = tmp_path.glob("*.whl")
    assert not wheel.name.endswith("none-any.whl"), "it runs on one platform"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.startswith("encoder_fast/_cuda."))
        assert not [n for n in archive.namelist() if "csrc" in n]
        archive.extractall(tmp_path / "site")
    libraries = subprocess.run(
        ["ldd", tmp_path / "site" / name], capture_output=True, text=True, check=True
    ).stdout
    assert "cudart" not in libraries and "torch" not in libraries
    code = "import encoder_fast._cuda as cuda; print(cuda.launch())"
    error = int(succeed(python(code, tmp_path / "site")))
    assert error in (0, 35, 100), "success, an old driver or no device"


def nvidia_smi(folder: Path, script: str) -> Path:
    """A folder with a program of that name."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return folder


def test_the_gpu_that_is_here_is_all_that_is_compiled_for(small: Path, tmp_path: Path) -> None:
    """Two H100 and an L40S: Hopper's instructions are in its own target alone."""
    code = "import setup; print(*setup.architectures())"
    stub = "import setuptools; setuptools.setup = lambda **_: None; import sys; "
    folder = nvidia_smi(tmp_path, "echo 9.0; echo 9.0; echo 8.9")
    path = f"{folder}:{os.environ['PATH']}"
    environment = {"ENCODER_FAST_CUDA_ARCHS": "native", "PATH": path}
    output = succeed(run([sys.executable, "-c", stub + code], small, **environment))
    assert output.split()[-3:] == [
        "-gencode=arch=compute_89,code=sm_89",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_89,code=compute_89",
    ]


def test_without_nvcc_the_wheel_is_pure(small: Path, build_tools: None) -> None:
    result = run([sys.executable, "-c", SETUP_WITHOUT_NVCC], small, ENCODER_FAST_BUILD_CUDA="")
    succeed(result)
    (wheel,) = wheels(small / "dist")
    assert wheel.endswith("py3-none-any.whl")


def test_without_nvcc_asking_for_the_extension_is_an_error(small: Path) -> None:
    result = run([sys.executable, "-c", SETUP_WITHOUT_NVCC], small, ENCODER_FAST_BUILD_CUDA="1")
    assert result.returncode != 0
    assert "ENCODER_FAST_BUILD_CUDA=1, but nvcc is neither in CUDA_HOME nor on PATH" in (
        result.stderr
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ENCODER_FAST_BUILD_CUDA", "yes", "must be 0 or 1, got 'yes'"),
        ("ENCODER_FAST_CUDA_ARCHS", "75", "architectures from 80 on, such as '80 90a', got '75'"),
        ("ENCODER_FAST_CUDA_ARCHS", "80 hopper", "got 'hopper'"),
        ("ENCODER_FAST_CUDA_ARCHS", "native", "but nvidia-smi names no GPU"),
    ],
)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_settings_that_mean_nothing(
    small: Path, name: str, value: str, message: str, tmp_path: Path
) -> None:
    # no GPU, whatever is here
    path = f"{nvidia_smi(tmp_path, 'exit 9')}:{os.environ['PATH']}"
    environment = {"ENCODER_FAST_BUILD_CUDA": "1", "PATH": path, name: value}
    result = run([sys.executable, "setup.py", "-q", "build_ext"], small, **environment)
    assert result.returncode != 0
    assert message in result.stderr
