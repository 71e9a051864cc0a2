"""What becomes of the CPU extension when the package is built."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from test_packaging import build_tools, python, run, source, succeed
from test_packaging_cuda import wheels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="its kernels are for x86-64"),
]

__all__ = ["build_tools", "source"]  # fixtures

WHEEL = [sys.executable, "setup.py", "--quiet", "bdist_wheel"]


@pytest.fixture(scope="module")
def built(source: Path, build_tools: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the wheel in `dist` and the objects in `build`."""
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        pytest.skip("Python's headers are not installed")
    copy = tmp_path_factory.mktemp("cpu") / "a folder: $PATH"
    shutil.copytree(source, copy, symlinks=True)
    # a compiler with options, as ccache's users have it
    succeed(run([*WHEEL], copy, ENCODER_FAST_BUILD_CPU="1", CXX="c++ -Wall"))
    return copy


@pytest.fixture(scope="module")
def extension(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension, unpacked from the wheel beside the package."""
    site = tmp_path_factory.mktemp("site")
    (wheel,) = (built / "dist").glob("*.whl")
    assert not wheel.name.endswith("none-any.whl"), "it runs on one platform"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "csrc" in name]
        archive.extractall(site)
    (found,) = site.glob("encoder_fast/_cpu.*.so")
    assert not list(site.glob("encoder_fast/_cuda*"))
    return found


def test_the_wheel_runs_it(extension: Path, tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from encoder_fast.ops.attention import attention\n"
        "from encoder_fast.backends import cpu_kernels\n"
        "q = torch.randn(9, 2, 16)\n"
        "bounds = torch.tensor([0, 9], dtype=torch.int32)\n"
        "assert attention(q, q, q, bounds, 9).isfinite().all()\n"
        "print(cpu_kernels.__file__, cpu_kernels.why_not())\n"
    )
    output = succeed(python(code, tmp_path, extension.parents[1]))
    assert output.startswith(str(extension.parents[1]))
    assert output.endswith("None") or "lacks AVX2" in output


def listing(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_its_threads_are_those_of_pytorch(extension: Path) -> None:
    # A library of its own would bring a second pool of threads.
    assert not re.search(r"NEEDED.*(omp|torch)", listing("readelf", "-d", extension))
    undefined = re.findall(r" U ((?:GOMP|omp|__kmpc)_\w*)", listing("nm", "-D", extension))
    assert undefined == ["GOMP_parallel"]


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_no_instruction_strays(built: Path, isa: str) -> None:
    # Of a function that two objects define, the linker keeps one, for all processors; and what is
    # initialised at the start runs on all of them.
    (compiled,) = (built / "build").rglob(f"cpu.isa_{isa}.cpp.o")
    symbols = re.findall(r"^[0-9a-f]+ ([A-Zu]) (\S+)", listing("nm", "-C", compiled), re.MULTILINE)
    ((kind, name),) = symbols
    assert kind in "DR" and name.endswith("Kernels"), "the table of kernels and nothing else"
    assert ".init_array" not in listing("readelf", "-S", compiled)


def test_the_other_extension_is_compiled_without_it(source: Path) -> None:
    code = (
        "import setuptools, sys\n"
        "setuptools.setup = lambda **_: None\n"
        "sys.path.insert(0, '.')\n"
        "from setup import CPU, CSRC, extension\n"
        "for name, folder in (('CPU', CPU), ('CUDA', CSRC)):\n"
        "    (one,) = extension('x', name, folder, None)\n"
        "    print(name, *one.sources)\n"
    )
    unset = {"ENCODER_FAST_BUILD_CPU": "", "ENCODER_FAST_BUILD_CUDA": ""}
    lines = succeed(run([sys.executable, "-c", code], source, **unset)).splitlines()
    files = {name: paths for name, *paths in map(str.split, lines)}
    cpu, cuda = files["CPU"], files["CUDA"]
    assert cpu and all(path.startswith("csrc/cpu/") for path in cpu)
    assert "csrc/bindings.cpp" in cuda and not set(cpu) & set(cuda)


def test_a_compiler_that_cannot_costs_speed_alone(
    source: Path, build_tools: None, tmp_path: Path
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho unrecognized option >&2\nexit 1\n")
    compiler.chmod(0o755)
    copy = tmp_path / "source"
    shutil.copytree(source, copy, symlinks=True)
    environment = {"CXX": str(compiler), "ENCODER_FAST_BUILD_CPU": ""}
    # What an earlier build has left would be packed.
    name = f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    lib = copy / "build" / f"lib.linux-x86_64-{sys.implementation.cache_tag}"
    (lib / "encoder_fast").mkdir(parents=True)
    (lib / "encoder_fast" / name).write_bytes(b"old")
    result = run([*WHEEL], copy, **environment)
    assert "failed" in result.stderr and succeed(result) is not None
    (wheel,) = wheels(copy / "dist")
    with zipfile.ZipFile(copy / "dist" / wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]

    asked = run([*WHEEL], copy, **{**environment, "ENCODER_FAST_BUILD_CPU": "1"})
    assert asked.returncode != 0


def test_without_a_compiler(source: Path, build_tools: None, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy, symlinks=True)
    environment = {"CXX": "no-such-compiler", "ENCODER_FAST_BUILD_CPU": ""}
    output = succeed(run([sys.executable, "setup.py", "build_ext"], copy, **environment))
    assert "no CPU extension, for there is no C++ compiler" in output
    succeed(run([*WHEEL], copy, **environment))
    (wheel,) = wheels(copy / "dist")
    assert wheel.endswith("py3-none-any.whl")
    asked = run([*WHEEL], copy, **{**environment, "ENCODER_FAST_BUILD_CPU": "1"})
    assert asked.returncode != 0
    assert "ENCODER_FAST_BUILD_CPU=1, but there is no C++ compiler" in asked.stderr


def test_none_is_built_where_none_is_wanted(source: Path, build_tools: None) -> None:
    code = (
        "import setuptools, sys\n"
        "setuptools.setup = lambda **_: None\n"
        "sys.path.insert(0, '.')\n"
        "from setup import CPU, extension\n"
        "print(extension('x', 'CPU', CPU, None))\n"
    )
    wanted = {"ENCODER_FAST_BUILD_CPU": "0", "CXX": "c++"}
    assert succeed(run([sys.executable, "-c", code], source, **wanted)) == "[]"


def test_a_setting_that_means_nothing(source: Path) -> None:
    result = run([*WHEEL], source, ENCODER_FAST_BUILD_CPU="yes")
    assert result.returncode != 0
    assert "ENCODER_FAST_BUILD_CPU must be 0 or 1, got 'yes'" in result.stderr
