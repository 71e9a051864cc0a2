"""The part of the build that TOML cannot say; all else is in `pyproject.toml`.

The kernels lie in `kernels/` at the top of the repository and are imported as
`encoder_fast.kernels` through the symlink `encoder_fast/kernels`. The folder has no
`__init__.py`: as a package it would hide the distribution `kernels`, which transformers imports.
setuptools finds no package without `__init__.py`, so this one is named here.

Where there is nvcc, ninja builds the CUDA extension `encoder_fast._cuda` from `csrc/`. It needs a
C++ compiler and Python's headers besides, neither torch nor a GPU. By environment variable:

- `ENCODER_FAST_BUILD_CUDA`: 1 makes it an error that one of these is missing, 0 builds none.
- `ENCODER_FAST_CUDA_ARCHS`: what to compile for, by default "80 90a". The first is kept as PTX
  too, from which the driver of a later GPU makes what it needs.
- `MAX_JOBS`: compilers at a time, by default as many as there are processors.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
ARCHS = "80 90a"


def find_nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, of the path, or where its installer puts it."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    for candidate in (*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(candidate)
        if found:
            return found
    return None


def missing() -> str | None:
    """What keeps the CUDA extension from being built here."""
    if find_nvcc() is None:
        return "nvcc is neither in CUDA_HOME nor on PATH"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "there is no C++ compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return f"there is no Python.h in {sysconfig.get_paths()['include']}"
    if find_spec("pybind11") is None:
        return "the package pybind11 is not installed"
    if shutil.which("ninja") is None and find_spec("ninja") is None:
        return "ninja is not installed"
    return None


def extensions() -> list[Extension]:
    wanted = os.environ.get("ENCODER_FAST_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"ENCODER_FAST_BUILD_CUDA must be 0 or 1, got {wanted!r}")
    reason = missing()
    if wanted == "1" and reason is not None:
        raise SystemExit(f"ENCODER_FAST_BUILD_CUDA=1, but {reason}")
    if reason is not None and "build_ext" in sys.argv:
        print(f"encoder_fast: no CUDA extension, for {reason}")
    if wanted == "0" or reason is not None:
        return []
    sources = sorted(p.as_posix() for p in CSRC.rglob("*") if p.suffix in (".cu", ".cpp"))
    headers = sorted(p.as_posix() for p in CSRC.rglob("*") if p.suffix in (".cuh", ".h"))
    return [Extension("encoder_fast._cuda", sources, depends=headers)]


def architectures() -> list[str]:
    """nvcc's options for the architectures to compile for."""
    archs = re.split(r"[\s,;]+", os.environ.get("ENCODER_FAST_CUDA_ARCHS", "").strip() or ARCHS)
    for arch in archs:
        number = re.fullmatch(r"(\d+)[af]?", arch)
        if number is None or int(number[1]) < 80:
            raise SystemExit(
                "ENCODER_FAST_CUDA_ARCHS must list architectures from 80 on, such as "
                f"'80 90a', got {arch!r}"
            )
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"]


def ninja_file(nvcc: str, sources: list[str], target: Path) -> str:
    """Compile each source by itself, so that they run side by side; then link."""
    import pybind11

    root = Path.cwd()
    includes = [root / CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
    # The bindings name no CUDA header and take no kernel: g++ alone compiles them.
    host = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"]
    device = ["-std=c++17", "-O3", "--cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    lines = [
        "ninja_required_version = 1.5",
        f"nvcc = {nvcc}",
        f"host = {' '.join(host)} {' '.join(f'-I{path}' for path in includes)}",
        f"device = {' '.join([*device, *architectures()])} -I{root / CSRC}",
        "rule cu",
        "  command = $nvcc $device -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cpp",
        f"  command = {os.environ.get('CXX', 'c++')} $host -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $nvcc -shared --cudart=static {' '.join(architectures())} $in -o $out",
    ]
    objects = []
    for source in sources:
        objects.append(source.removeprefix(f"{CSRC}/").replace("/", ".") + ".o")
        lines.append(f"build {objects[-1]}: {Path(source).suffix[1:]} {root / source}")
    return "\n".join([*lines, f"build {target}: link {' '.join(objects)}", ""])


class BuildCuda(build_ext):
    """Hands the one extension to ninja."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None, "extensions() gave one"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp, "cuda").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath("build.ninja").write_text(ninja_file(nvcc, ext.sources, target))
        # The package ninja has it as a module too, and may not be on the path.
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(
            [*command, "-C", str(folder), *(["-j", jobs] if jobs else [])],
            check=True,
        )


if not Path("encoder_fast/kernels").is_dir():
    raise SystemExit(
        "encoder_fast/kernels is not a folder. It is a symlink to kernels/; clone with "
        "`git -c core.symlinks=true clone`, on a file system that has symlinks."
    )

setup(
    packages=[*find_packages(include=["encoder_fast", "encoder_fast.*"]), "encoder_fast.kernels"],
    package_data={"": ["*.json", "*.jsonl", "*.txt"]},
    include_package_data=False,
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCuda},
)
