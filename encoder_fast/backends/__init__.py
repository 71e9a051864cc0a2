"""The backends: sets of op implementations that never import one another.

``reference`` (plain PyTorch, the oracle), ``cpu`` (oneDNN) and ``triton`` (NVIDIA, Ampere and
later). Each is a module with the same functions; the ops choose one and call it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

from encoder_fast.errors import BackendUnavailableError

NAMES = ("reference", "cpu", "triton")

_loaded: dict[str, ModuleType] = {}


def load(name: str) -> ModuleType:
    """The module of a backend whose name :func:`resolve` has let pass."""
    module = _loaded.get(name)
    if module is None:
        module = _loaded[name] = importlib.import_module(f"encoder_fast.backends.{name}")
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
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu":
        return None if triton_interprets() else "backend 'triton' needs an NVIDIA GPU, got cpu"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"backend 'triton' needs an NVIDIA GPU, got {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"backend 'triton' needs sm_80 (Ampere) or later, got sm_{major}{minor}"
    return None


def resolve(name: str, device: torch.device) -> tuple[str, str]:
    """Choose the backend for a device.

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
    return choice, f"auto: the backend for {device.type}"
