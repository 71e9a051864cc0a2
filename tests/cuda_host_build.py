"""Compiles the CUDA C++ sources for the CPU, over the emulation in `tests/cuda_host/`.

A build is kept under `.cache/cuda_host/`, named by a hash of everything that goes into it: it is
made once, whichever worker of the tests comes first. So is each object, by a hash of the unit as
the preprocessor leaves it: a change compiles what it reaches and no more.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests/cuda_host"
CACHE = ROOT / ".cache/cuda_host"
OBJECTS = CACHE / "objects"
MOST_OBJECTS = 200

FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    # Distributions that harden by default check longjmp for a stack of one's own.
    "-U_FORTIFY_SOURCE",
    *("-DENCODER_FAST_HOST", f"-I{ROOT / 'csrc'}", f"-I{EMULATION}"),
)


UNITS = (".cu", ".cpp")


def why_not() -> str | None:
    """Why nothing can be built here; `None` where it can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's headers are not installed"
    return None


@functools.cache
def build(module: str, *sources: Path) -> ModuleType:
    """Compile the emulation and `sources` to an extension module, and import it."""
    import pybind11

    command = ["g++", *FLAGS, f"-I{pybind11.get_include()}"]
    command += [f"-I{sysconfig.get_paths()['include']}"]
    ingredients = hashlib.sha256(" ".join([sys.version, pybind11.__version__, *command]).encode())
    headers = (path for folder in (ROOT / "csrc", EMULATION) for path in folder.rglob("*.*h"))
    units = (*sorted(EMULATION.glob("*.cpp")), *sources)
    for path in (*sorted(headers), *units):
        ingredients.update(path.read_bytes())

    folder = CACHE / f"{module}-{ingredients.hexdigest()[:16]}"
    target = folder / f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{module}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for stale in CACHE.glob(f"{module}-*"):
                shutil.rmtree(stale)
            folder.mkdir()
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                objects = [str(path) for path in pool.map(lambda x: _compile(command, x), units)]
            _run(["g++", "-shared", *objects, "-o", str(folder / "unfinished")])
            (folder / "unfinished").rename(target)
            newest_first = sorted(OBJECTS.glob("*.o"), key=lambda x: x.stat().st_mtime)[::-1]
            for stale in newest_first[MOST_OBJECTS:]:
                stale.unlink(missing_ok=True)
    sys.path.insert(0, str(folder))
    return importlib.import_module(module)


def build_probe() -> ModuleType:
    """The module `_cuda_probe`: small kernels that ask the emulation, one question each."""
    return build("_cuda_probe", EMULATION / "probe.cu", EMULATION / "wrappers.cu")


def build_backend() -> ModuleType:
    """The module `_cuda_host`, by which the backend `cuda-host` runs."""
    cpu = ROOT / "csrc/cpu"
    files = (path for path in (ROOT / "csrc").rglob("*.c*") if cpu not in path.parents)
    sources = sorted(path for path in files if path.suffix in UNITS)
    return build("_cuda_host", *sources)


def _compile(command: list[str], unit: Path) -> Path:
    """The object of a unit."""
    text = _run([*command, "-E", "-P", "-x", "c++", str(unit)])
    # But for the folders of headers, whose text is in.
    options = [option for option in command if not option.startswith("-I")]
    digest = hashlib.sha256(" ".join([sys.version, *options]).encode() + text.encode()).hexdigest()
    target = OBJECTS / f"{unit.name}-{digest[:16]}.o"
    if target.exists():
        target.touch()
    else:
        unfinished = f"{target}.{os.getpid()}"
        _run([*command, "-c", "-x", "c++", str(unit), "-o", unfinished])
        Path(unfinished).rename(target)
    return target


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return result.stdout
