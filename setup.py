"""The part of the build that TOML cannot say; all else is in `pyproject.toml`.

The kernels lie in `kernels/` at the top of the repository and are imported as
`encoder_fast.kernels` through the symlink `encoder_fast/kernels`. The folder has no
`__init__.py`: as a package it would hide the distribution `kernels`, which transformers imports.
setuptools finds no package without `__init__.py`, so this one is named here.

ninja builds two extensions, where there is what they take: Python's headers, a C++ compiler and

- for `encoder_fast._cpu`, from `csrc/cpu/`, a processor of x86-64;
- for `encoder_fast._cuda`, from all else in `csrc/`, nvcc. It takes no GPU.

Neither takes torch. By environment variable:

- `ENCODER_FAST_BUILD_CPU`, `ENCODER_FAST_BUILD_CUDA`: 1 makes it an error that something is missing
  or that the build fails, 0 builds none.
- `ENCODER_FAST_CUDA_ARCHS`: what to compile for, by default "80 90a"; "native" is the GPU that is
  here. The first is kept as PTX too, from which the driver of a later GPU makes what it needs.
- `MAX_JOBS`: compilers at a time, by default as many as there are processors.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
CPU = CSRC / "cpu"
DTYPES = CSRC / "dtype.h"
ARCHS = "80 90a"

# What the files of csrc/cpu/ that hold the kernels of one instruction set are compiled for.
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
INSTRUCTIONS = {
    "isa_avx2": AVX2,
    "isa_avx512": AVX512,
    "isa_avx512_bf16": f"{AVX512} -mavx512bf16",
}


def find_nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, of the path, or where its installer puts it."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    for candidate in (*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(candidate)
        if found:
            return found
    return None


def compiler() -> list[str]:
    """The C++ compiler, with the options that the user gives it."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def missing() -> str | None:
    """What keeps any extension from being built here."""
    if shutil.which(compiler()[0]) is None:
        return f"there is no C++ compiler {compiler()[0]!r}"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return f"there is no Python.h in {sysconfig.get_paths()['include']}"
    if find_spec("pybind11") is None:
        return "the package pybind11 is not installed"
    if shutil.which("ninja") is None and find_spec("ninja") is None:
        return "ninja is not installed"
    return None


def missing_for_cpu() -> str | None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"its kernels are for Linux on x86-64, not {sys.platform} on {platform.machine()}"
    return missing()


def missing_for_cuda() -> str | None:
    if find_nvcc() is None:
        return "nvcc is neither in CUDA_HOME nor on PATH"
    return missing()


def extension(name: str, title: str, folder: Path, reason: str | None) -> list[Extension]:
    """The extension of a folder; none where it is not wanted, or something is missing."""
    variable = f"ENCODER_FAST_BUILD_{title}"
    wanted = os.environ.get(variable, "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"{variable} must be 0 or 1, got {wanted!r}")
    if wanted == "1" and reason is not None:
        raise SystemExit(f"{variable}=1, but {reason}")
    if reason is not None and "build_ext" in sys.argv:
        print(f"encoder_fast: no {title} extension, for {reason}")
    if wanted == "0" or reason is not None:
        return []
    files = [path for path in folder.rglob("*") if folder == CPU or CPU not in path.parents]
    sources = sorted(p.as_posix() for p in files if p.suffix in (".cu", ".cpp"))
    headers = sorted(p.as_posix() for p in (*files, DTYPES) if p.suffix in (".cuh", ".h"))
    # A compiler too old for the CPU's instructions costs speed alone.
    optional = title == "CPU" and wanted != "1"
    return [Extension(name, sources, depends=headers, optional=optional)]


def extensions() -> list[Extension]:
    return [
        *extension("encoder_fast._cpu", "CPU", CPU, missing_for_cpu()),
        *extension("encoder_fast._cuda", "CUDA", CSRC, missing_for_cuda()),
    ]


def native_archs() -> str:
    """The architectures of the GPUs that are here."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"ENCODER_FAST_CUDA_ARCHS=native, but nvidia-smi names no GPU: {error}"
        ) from None
    archs = sorted({line.strip().replace(".", "") for line in found.splitlines() if line.strip()})
    # Hopper's own instructions are in no other target.
    return " ".join("90a" if arch == "90" else arch for arch in archs)


def architectures() -> list[str]:
    """nvcc's options for the architectures to compile for."""
    asked = os.environ.get("ENCODER_FAST_CUDA_ARCHS", "").strip() or ARCHS
    archs = re.split(r"[\s,;]+", native_archs() if asked == "native" else asked)
    for arch in archs:
        number = re.fullmatch(r"(\d+)[af]?", arch)
        if number is None or int(number[1]) < 80:
            raise SystemExit(
                "ENCODER_FAST_CUDA_ARCHS must list architectures from 80 on, such as "
                f"'80 90a', got {arch!r}"
            )
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"]


def ninja_file(sources: list[str], target: Path, nvcc: str | None) -> str:
    """Compile each source by itself, so that they run side by side; then link.

    Args:
        nvcc: `None` for what no CUDA source is in.
    """
    import pybind11

    root = Path.cwd()
    includes = [root / CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
    host = [*compiler(), "-std=c++17", "-fPIC", "-fvisibility=hidden"]
    # Where nvcc compiles the kernels, the bindings are all that is left for g++.
    host += ["-O2" if nvcc else "-O3", *(f"-I{path}" for path in includes)]
    link = [*compiler(), "-shared"]
    lines = ["ninja_required_version = 1.5"]
    if nvcc:
        device = [nvcc, "-std=c++17", "-O3", "--cudart=static", *architectures()]
        device += ["-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{root / CSRC}"]
        link = [nvcc, "-shared", "--cudart=static", *architectures()]
        lines += [
            "rule cu",
            f"  command = {in_shell(device)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    lines += [
        "rule cpp",
        f"  command = {in_shell(host)} $instructions -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {in_shell(link)} $in -o $out",
    ]
    objects = []
    for source in map(Path, sources):
        objects.append(source.relative_to(CSRC).as_posix().replace("/", ".") + ".o")
        lines.append(f"build {objects[-1]}: {source.suffix[1:]} {path_in_ninja(root / source)}")
        if source.stem in INSTRUCTIONS:
            lines.append(f"  instructions = {INSTRUCTIONS[source.stem]}")
    lines.append(f"build {path_in_ninja(target)}: link {' '.join(objects)}")
    return "\n".join([*lines, ""])


def in_shell(words: list[str]) -> str:
    """A command for the shell, in ninja's file."""
    return shlex.join(words).replace("$", "$$")


def path_in_ninja(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


class BuildByNinja(build_ext):
    """Hands each extension to ninja."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc() if ext.name.endswith("_cuda") else None
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp, ext.name.rpartition("_")[2]).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath("build.ninja").write_text(ninja_file(ext.sources, target, nvcc))
        # The package ninja has it as a module too, and may not be on the path.
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        jobs = os.environ.get("MAX_JOBS")
        # If this build fails and is forgiven, an older one must not go into the package.
        target.unlink(missing_ok=True)
        try:
            subprocess.run(
                [*command, "-C", str(folder), *(["-j", jobs] if jobs else [])],
                check=True,
            )
        except subprocess.CalledProcessError as error:
            # what setuptools forgives an optional extension
            raise CompileError(str(error)) from error


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
    cmdclass={"build_ext": BuildByNinja},
)
