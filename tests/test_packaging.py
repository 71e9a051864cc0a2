"""The package as users get it: built, installed into an empty environment, imported from elsewhere.

Nothing is downloaded: builds use the setuptools at hand, and the new environments see the
dependencies of this one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

import pytest

import encoder_fast

ROOT = Path(__file__).resolve().parents[1]
NAME = f"encoder_fast-{encoder_fast.__version__}"

# What belongs to the project, whatever else lies in its folder; tests/, bench/ and docs/ are
# copied to see that they stay out of what is built.
SOURCES = (
    *("encoder_fast", "kernels", "csrc", "tests", "bench", "docs"),
    *("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"),
)

FAKE_KERNELS = """
from unittest.mock import MagicMock

def use_kernel_forward_from_hub(layer_name):
    return lambda cls: cls

def use_kernelized_func(*functions):
    return lambda cls: cls

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
"""

BUILD_A_BERT = """
import kernels, transformers
from transformers import BertConfig, BertModel
from transformers.utils import is_kernels_available
assert is_kernels_available(), "transformers does not take the fake package for the real one"
BertModel(BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=9))
print(kernels.__file__)
"""


def python(
    code: str, cwd: Path, *path: Path, executable: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that imports from `cwd`, `path` and its site-packages."""
    return run([executable, "-c", code], cwd, PYTHONPATH=os.pathsep.join(map(str, path)))


def run(
    command: list[str | Path], cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with an environment that names no import path and reaches no index.

    Packages are built without extensions, as where there is no compiler.
    """
    base = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    fixed = {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    fixed |= {"ENCODER_FAST_BUILD_CPU": "0", "ENCODER_FAST_BUILD_CUDA": "0"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**base, **fixed, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    """The output of a command that must not fail."""
    assert result.returncode == 0, f"{result.args}\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


def package_files() -> dict[str, Path]:
    """Every file that users need: its name in a distribution, and where it lies in the tree."""
    files = {}
    for folder, prefix in ((ROOT / "encoder_fast", ""), (ROOT / "kernels", "encoder_fast/")):
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".pyc", ".so"):
                files[prefix + path.relative_to(folder.parent).as_posix()] = path
    return files


def cuda_sources() -> list[Path]:
    return [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h")]


@pytest.fixture(scope="module")
def build_tools() -> None:
    """Skip where the tools that build and install are missing."""
    needed = {"build": 1, "ninja": 1, "pip": 23, "pybind11": 2, "setuptools": 77}
    for tool, minimum in needed.items():
        try:
            major = int(version(tool).split(".")[0])
        except PackageNotFoundError:
            pytest.skip(f"{tool} is not installed")
        if major < minimum:
            pytest.skip(f"{tool} {minimum} or later is needed, {version(tool)} is installed")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, so that building leaves nothing behind in the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
            shutil.copytree(path, copy / name, symlinks=True, ignore=ignore)
        elif path.exists():
            shutil.copy(path, copy / name)
    return copy


@pytest.fixture(scope="module")
def dist(build_tools: None, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder]
    succeed(run([*build, source], source))
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return dist / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def new_environment(
    build_tools: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Path]]:
    """Makes a virtual environment with one thing installed in it; returns its folder."""

    def make(*what: str | Path) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        succeed(run([sys.executable, "-m", "venv", "--without-pip", folder], folder))
        executable = folder / "bin/python"
        purelib = succeed(
            python(
                "import sysconfig; print(sysconfig.get_path('purelib'))",
                folder,
                executable=executable,
            )
        )
        # Only what lies in these folders: the .pth files there, by which this checkout may be
        # installed in this environment, are not followed.
        outer = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        Path(purelib, "outer.pth").write_text("\n".join(outer))
        pip = [sys.executable, "-m", "pip", "--python", executable, "install", "--quiet"]
        # This environment's own encoder_fast is in sight of pip, and must not count as installed.
        options = ["--no-deps", "--no-build-isolation", "--ignore-installed"]
        succeed(run([*pip, *options, *what], folder))
        return folder

    yield make


@pytest.fixture(scope="module")
def installed(wheel: Path, new_environment: Callable[..., Path]) -> Path:
    return new_environment(wheel)


@pytest.fixture
def fake_kernels(tmp_path: Path) -> Path:
    """A folder with a distribution `kernels` of a version that transformers accepts."""
    import_utils = pytest.importorskip("transformers.utils.import_utils")
    release = getattr(import_utils, "KERNELS_MIN_VERSION", "0.11.0")
    folder = tmp_path / "site"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels/__init__.py").write_text(FAKE_KERNELS)
    info = folder / f"kernels-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {release}\n")
    return folder


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    link = ROOT / "encoder_fast/kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"


def test_bert_imports_from_the_repository_beside_the_package_kernels(fake_kernels: Path) -> None:
    """The repository comes first on the import path, the package second, and still wins."""
    kernels = succeed(python(BUILD_A_BERT, ROOT, fake_kernels))
    assert Path(kernels) == fake_kernels / "kernels/__init__.py"


def test_a_package_of_ours_would_hide_it(fake_kernels: Path, tmp_path: Path) -> None:
    """With an `__init__.py` in `kernels/` the test above fails, on transformers 5.x by an error."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").touch()
    result = python(BUILD_A_BERT, tmp_path, fake_kernels)
    hidden = result.stdout.strip() == str(tmp_path / "kernels/__init__.py")
    assert hidden or (result.returncode != 0 and "ImportError" in result.stderr)


def test_import_loads_nothing_else() -> None:
    heavy = {"torch", "transformers", "triton", "typer", "rich", "matplotlib", "numpy"}
    code = f"import sys, encoder_fast; print(*sorted({heavy} & set(sys.modules)))"
    assert succeed(python(code, ROOT)) == ""


def test_patch_loads_neither_the_kernels_nor_the_command_line() -> None:
    """triton itself is not looked for: torch's own compiler imports it wherever it is installed."""
    code = """
import sys, torch, transformers
before = set(sys.modules)
import encoder_fast
encoder_fast.patch
print(*sorted(set(sys.modules) - before))
"""
    loaded = set(succeed(python(code, ROOT)).split())
    assert "encoder_fast.patching" in loaded
    assert not loaded & {"typer", "rich", "matplotlib"}
    assert not [name for name in loaded if name.startswith("encoder_fast.kernels")]


def test_public_names_are_no_modules() -> None:
    """A module named like a public function takes its place in the package once it is loaded."""
    code = """
import types, encoder_fast
for name in [*encoder_fast.__all__, *encoder_fast.__all__]:
    if isinstance(getattr(encoder_fast, name), types.ModuleType):
        print(name)
"""
    assert succeed(python(code, ROOT)) == ""


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
        for entry in entries:
            assert not stat.S_ISLNK(entry.external_attr >> 16), entry.filename
        names = {entry.filename for entry in entries}
        assert {PurePosixPath(name).parts[0] for name in names} == {
            "encoder_fast",
            f"{NAME}.dist-info",
        }
        expected = package_files()
        assert {name for name in names if name.startswith("encoder_fast/")} == set(expected)
        for name, path in expected.items():
            assert archive.read(name) == path.read_bytes(), name
    kernels = {f"encoder_fast/kernels/{name}" for name in ("attention.py", "launch_table.json")}
    assert {"encoder_fast/py.typed", *kernels} <= names


@pytest.mark.slow
def test_source_distribution_holds_real_files(dist: Path) -> None:
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    names = {member.name.removeprefix(f"{NAME}/") for member in members if member.isfile()}
    assert set(package_files()) <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "setup.py", "pyproject.toml"} <= names
    assert {path.relative_to(ROOT).as_posix() for path in cuda_sources()} <= names
    tops = {PurePosixPath(name).parts[0] for name in names}
    assert not tops & {"kernels", "tests", "bench"}


@pytest.mark.slow
def test_wheel_from_the_tree_is_the_wheel_from_the_source_distribution(
    wheel: Path, source: Path, tmp_path: Path
) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path]
    succeed(run([*build, source], source))
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(tmp_path / wheel.name) as other:
        assert {e.filename: e.CRC for e in one.infolist()} == {
            e.filename: e.CRC for e in other.infolist()
        }


@pytest.mark.slow
def test_installed_wheel_imports_from_elsewhere(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib.metadata, importlib.util, encoder_fast
assert importlib.metadata.version("encoder-fast") == encoder_fast.__version__
assert importlib.util.find_spec("kernels") is None, "a top-level kernels was installed"
encoder_fast.patch
print(encoder_fast.__file__)
"""
    file = succeed(python(code, tmp_path, executable=installed / "bin/python"))
    assert Path(file).is_relative_to(installed)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_installed_kernels_import(installed: Path, tmp_path: Path) -> None:
    names = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    code = f"""
import importlib
for name in {names}:
    print(importlib.import_module("encoder_fast.kernels." + name).__file__)
"""
    files = succeed(python(code, tmp_path, executable=installed / "bin/python")).splitlines()
    assert len(files) == len(names)
    assert all(Path(file).is_relative_to(installed) for file in files)


@pytest.mark.slow
def test_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    output = succeed(run([installed / "bin/encoder-fast", "info"], tmp_path))
    assert encoder_fast.__version__ in output


@pytest.mark.slow
def test_installed_command_embeds(installed: Path, tmp_path: Path) -> None:
    """A command that loads a model, in a folder where the tree is not in sight."""
    pytest.importorskip("transformers")
    from cli_runs import tiny_model

    model = tiny_model(tmp_path / "model")
    (tmp_path / "lines.txt").write_text("a b\nc\n")
    command = [installed / "bin/encoder-fast", "embed", "lines.txt", "-m", model, "-o", "out.npy"]
    succeed(run(command, tmp_path))
    assert (tmp_path / "out.npy").stat().st_size == 128 + 2 * 48 * 4
    result = run([*command[:-1], "no/out.npy"], tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_editable_install_imports_the_tree(
    source: Path, new_environment: Callable[..., Path], tmp_path: Path
) -> None:
    environment = new_environment("--editable", source)
    code = """
import importlib.util, encoder_fast
assert importlib.util.find_spec("kernels") is None, "the tree's kernels became a package"
print(encoder_fast.__file__)
print(importlib.util.find_spec("encoder_fast.kernels.attention").origin)
"""
    executable = environment / "bin/python"
    package, kernel = succeed(python(code, tmp_path, executable=executable)).splitlines()
    assert Path(package) == source / "encoder_fast/__init__.py"
    assert Path(kernel).resolve() == source / "kernels/attention.py"
