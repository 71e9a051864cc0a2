"""The backends: sets of op implementations that never import one another.

``reference`` (plain PyTorch, the oracle), ``cpu`` (oneDNN), ``triton`` and ``cuda`` (NVIDIA, Ampere
and later). Each is a module with the same functions; the ops choose one and call it.
``cuda-host`` is ``cuda`` over an emulated GPU, for tests.

``auto`` becomes ``cpu`` or ``triton`` by the device, or ``measured`` where a table of measurements,
or a prediction as long as there is none, says that some ops are faster on another.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

from encoder_fast.backends import measurements
from encoder_fast.errors import BackendUnavailableError

NAMES = ("reference", "cpu", "triton", "cuda", "cuda-host")

_loaded: dict[str, ModuleType] = {}


# Else torch.compile would break its graph, or guard what it changes, where a first call imports.
@torch.compiler.assume_constant_result
def load(name: str) -> ModuleType:
    """The module of a backend whose name :func:`resolve` has let pass."""
    module = _loaded.get(name)
    if module is None:
        file = name.replace("-", "_")
        module = _loaded[name] = importlib.import_module(f"encoder_fast.backends.{file}")
    return module


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def why_not(name: str, device: torch.device) -> str | None:
    """Why a backend can't run on ``device``; ``None`` where it can."""
    if name == "reference":
        return None
    if name == "cpu":
        return None if device.type == "cpu" else f"backend 'cpu' can't run on {device}"
    if name == "cuda-host":
        if importlib.util.find_spec("_cuda_host") is None:
            return "backend 'cuda-host' is for tests: its extension _cuda_host is not built"
        return None if device.type == "cpu" else f"backend 'cuda-host' can't run on {device}"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if name == "cuda":
        reason = _why_no_extension()
        if reason is not None:
            return reason
    if device.type == "cpu" and name == "triton" and triton_interprets():
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"backend {name!r} needs an NVIDIA GPU, got {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"backend {name!r} needs sm_80 (Ampere) or later, got sm_{major}{minor}"
    return None


def _why_no_extension() -> str | None:
    """Why there is no CUDA extension; ``None`` where there is."""
    if importlib.util.find_spec("encoder_fast._cuda") is None:
        return (
            "the extension encoder_fast._cuda is not built; that takes nvcc when encoder_fast is "
            "installed, and with ENCODER_FAST_BUILD_CUDA=1 it is an error to have none"
        )
    try:
        importlib.import_module("encoder_fast._cuda")
    except ImportError as error:
        return f"the extension encoder_fast._cuda does not load: {error}"
    return None


# It asks what torch.compile can't trace: what is installed, and what a GPU is.
@torch.compiler.assume_constant_result
def resolve(
    name: str, device: torch.device, needs: frozenset[str] = frozenset()
) -> tuple[str, str]:
    """Choose the backend for a device.

    Args:
        needs: what not every backend has and an encoder asks for, as ``EncoderSpec.needs`` says it.

    Returns:
        The backend's name and, for a reader, why it was chosen.

    Raises:
        BackendUnavailableError: the backend asked for can't run there, or ``auto`` finds none.
    """
    if name != "auto":
        if name not in NAMES:
            raise ValueError(f"backend must be 'auto' or one of {NAMES}, got {name!r}")
        reason = why_not(name, device)
        if reason is not None:
            raise BackendUnavailableError(reason)
        return name, "asked for by name"
    choice = {"cpu": "cpu", "cuda": "triton"}.get(device.type)
    if choice is None:
        raise BackendUnavailableError(f"no backend runs on device {device}")
    reason = why_not(choice, device)
    if reason is not None:
        raise BackendUnavailableError(reason)
    if choice == "triton" and why_not("cuda", device) is None:
        found = {
            "measured": measurements.faster_ops(device),
            "predicted": measurements.predicted_ops(device, needs),
        }
        reasons = [f"as {how}, {ops} on cuda" for how, ops in found.items() if ops]
        if reasons:
            return "measured", f"auto: {'; '.join(reasons)}; the rest on triton"
    return choice, f"auto: the backend for {device.type}"
