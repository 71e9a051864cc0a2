"""Which of our files decide a figure, so that a later reader sees when they have changed."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What runs any spec on any backend.
_ENGINE = (
    "encoder_fast/engine.py",
    "encoder_fast/fingerprints.py",
    "encoder_fast/gaps.py",
    "encoder_fast/onlookers.py",
    "encoder_fast/packing.py",
    "encoder_fast/position_tables.py",
    "encoder_fast/spec.py",
    "encoder_fast/weights.py",
)

# Everything that runs in a forward. Text handling, the command line and reports leave times alone.
_PATTERNS = (
    *("kernels/*.py", "kernels/*.json", "csrc/**/*"),
    *("encoder_fast/backends/*.json", "encoder_fast/backends/*.py"),
    *("encoder_fast/ops/*.py", "encoder_fast/families/*.py"),
    *_ENGINE,
    *("encoder_fast/graphs/*.py", "encoder_fast/patching/*.py", "encoder_fast/text/*.py"),
)


@functools.cache
def fingerprints(root: Path = ROOT) -> dict[str, str]:
    """A hash of each source file, by its path in the repository."""
    files = {path for pattern in _PATTERNS for path in root.glob(pattern) if path.is_file()}
    return {
        path.relative_to(root).as_posix(): fingerprint(path)
        for path in sorted(files)
        if path.suffix not in (".so", ".o", ".pyc")
    }


def fingerprint(path: Path) -> str:
    """Of a Python file the hash of what it does: comments and docstrings don't count."""
    content = path.read_bytes()
    if path.suffix == ".py":
        tree = ast.parse(content)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and _has_docstring(
                node.body
            ):
                node.body = node.body[1:] or [ast.Pass()]
        content = ast.dump(tree).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def _has_docstring(body: list[ast.stmt]) -> bool:
    first = body[0] if body else None
    return (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )


# The CPU backend's other files.
_CPU_FILES = {
    "attention": ("backends/cpu_attention.py", "backends/cpu_kernels.py"),
    "window_attention": ("backends/cpu_attention.py", "backends/cpu_kernels.py"),
    "disentangled_attention": ("backends/cpu_disentangled.py",),
    "add_layer_norm": ("backends/cpu_kernels.py",),
}

_CUDA = tuple(sorted(f"csrc/{p.name}" for p in (ROOT / "csrc").glob("*") if p.name != "cpu"))

# The Triton files behind an op; the others have none of their own.
_KERNELS = {
    "attention": ("attention", "attention_tiles", "launch_table"),
    "window_attention": ("local_attention", "attention_tiles"),
    "disentangled_attention": ("disentangled_attention", "attention_tiles"),
    "rotary": ("rotary",),
    "gated_feed_forward": ("gated",),
    "add_layer_norm": ("add_layer_norm", "row_norm", "launch_table"),
    "embed_layer_norm": ("embed_layer_norm", "row_norm", "launch_table"),
}


def sources_of_op(op: str, backend: str) -> tuple[str, ...]:
    """Prefixes of the files behind one op on one backend."""
    files = [f"{backend}.py", "linears.py", "pooling.py"]
    if backend == "cpu":
        files += ["heap.py", "onednn.py"]
    own = [f"encoder_fast/backends/{name}" for name in files]
    if backend == "cpu" and op in _CPU_FILES:
        own += [*(f"encoder_fast/{name}" for name in _CPU_FILES[op]), "csrc/cpu/", "csrc/dtype.h"]
    elif backend == "triton":
        own += [f"kernels/{name}." for name in (*_KERNELS.get(op, ()), "integers")]
    elif backend == "cuda":
        own += [*_CUDA, "encoder_fast/backends/cuda_kernels.py"]
    return tuple(own)


def sources_of_model(backend: str) -> tuple[str, ...]:
    """Prefixes of the files behind a whole model on one backend."""
    own = ("encoder_fast/backends/", "encoder_fast/ops/", "encoder_fast/patching/")
    if backend == "cpu":
        names = ("cpu", "heap.py", "linears.py", "masks.py", "onednn.py", "pooling.py")
        own = (*(f"encoder_fast/backends/{name}" for name in names), "encoder_fast/patching/")
    return *_ENGINE, *own, *(("csrc/cpu/",) if backend == "cpu" else ("kernels/", *_CUDA))


def changed(prefixes: Iterable[str], then: dict[str, str], now: dict[str, str]) -> tuple[str, ...]:
    """The files under ``prefixes`` that are not what they were."""
    prefixes = tuple(prefixes)
    if not prefixes:
        return ()
    return tuple(
        path
        for path in sorted({*then, *now})
        if path.startswith(prefixes) and then.get(path) != now.get(path)
    )
