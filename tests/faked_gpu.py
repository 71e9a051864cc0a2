"""A pytest plugin that fakes an H100: which tests would run there, and what would they compile?

    PYTHONPATH=.:tests python -m pytest -p faked_gpu --collect-only -q -m gpu tests
    PYTHONOPTIMIZE=1 PYTHONPATH=.:tests python -m pytest -p faked_gpu --assert=plain -q ...

The second also runs test bodies, to count the kernels that Triton would compile. Tensors for "cuda"
are made on the CPU, launches are noted and compute nothing, and with assertions off by Python's own
option nobody minds. What a test would find out on a card can't be seen here.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

CAPABILITY = (9, 0)
SHARED_MEMORY = 227 * 1024

# Kernels by their keys: name, types, alignments, constants and options.
_compiled: dict[str, set[str]] = defaultdict(set)
_everything: set[str] = set()
_file = ""


class _OnTheCpu(TorchFunctionMode):
    """Whatever is asked for on "cuda" is on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch.device:
            return function(*args, **kwargs or {})
        kwargs = {name: _moved(value) for name, value in (kwargs or {}).items()}
        if function is torch.Tensor.cuda:
            return args[0]
        return function(*map(_moved, args), **kwargs)


def _moved(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


def fake_torch() -> None:
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=80 << 30,
        multi_processor_count=132,
        shared_memory_per_block_optin=SHARED_MEMORY,
        L2_cache_size=50 << 20,
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": CAPABILITY,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "set_per_process_memory_fraction": None,
        "synchronize": None,
        "set_sync_debug_mode": None,
        "current_stream": SimpleNamespace(cuda_stream=0),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    _OnTheCpu().__enter__()


def fake_extension() -> None:
    """`encoder_fast._cuda`, whose functions do nothing."""

    class Extension(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") or name == "allow":
                raise AttributeError(name)
            return lambda *_: 0

    name = "encoder_fast._cuda"
    extension = Extension(name)
    extension.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = extension


def fake_launches() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Card:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = kernel.device_caches[0][-1]
        _, specialization, given = binder(*args, debug=False, **options)
        key = f"{kernel.__name__} {specialization} {given}"
        _compiled[_file].add(key)
        _everything.add(key)

    driver.set_active(Card())
    triton.JITFunction.run = note


def keep_counts() -> None:
    """What the host reads back is right, or it would allocate by chance."""
    from encoder_fast import backends
    from encoder_fast.backends import masks
    from encoder_fast.kernels import pack_mask

    def noted(real: Any, plain: Any) -> Any:
        def run(*args: Any) -> Any:
            real(*args)
            return plain(*args)

        return run

    for name in ("count_tokens", "place_tokens"):
        setattr(pack_mask, name, noted(getattr(pack_mask, name), getattr(masks, name)))

    resolve, why_not = backends.resolve, backends.why_not
    gpu = torch.device("cuda")
    backends.why_not = lambda name, _, *rest: why_not(name, gpu, *rest)
    backends.resolve = lambda name, _, *rest: resolve(name, gpu, *rest)


# Ahead of any conftest.py, which asks where it is.
fake_torch()
fake_extension()
fake_launches()
keep_counts()
# The rest of a test's body counts too.
torch.testing.assert_close = lambda *_, **__: None


def pytest_runtest_setup(item: pytest.Item) -> None:
    global _file
    _file = item.path.stem


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, keys in _compiled.items():
        terminalreporter.write_line(f"{name}: {len(keys)} kernels of Triton to compile")
    if _everything:
        terminalreporter.write_line(f"together: {len(_everything)} kernels of Triton to compile")
