"""Fused, padding-free inference for Hugging Face encoder models.

``encoder_fast.patch(model)`` replaces the hot path of an encoder in place; the model's calls,
outputs, state dict and files stay what they were, and ``encoder_fast.unpatch(model)`` undoes it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Nothing heavy is imported before it is used: PyTorch, Triton and the command line's libraries
# all load on first access of the name that needs them.
_EXPORTS = {
    "patch": "encoder_fast.patching",
    "unpatch": "encoder_fast.patching",
    "patched": "encoder_fast.patching",
    "report": "encoder_fast.patching",
    "check_parity": "encoder_fast.parity",
    "info": "encoder_fast.environment",
    "TextEncoder": "encoder_fast.text",
    "UnsupportedModelError": "encoder_fast.errors",
    "FallbackError": "encoder_fast.errors",
    "BackendUnavailableError": "encoder_fast.errors",
    "ModelFilesError": "encoder_fast.errors",
    "ParityError": "encoder_fast.errors",
}

if TYPE_CHECKING:
    from encoder_fast.environment import info
    from encoder_fast.errors import (
        BackendUnavailableError,
        FallbackError,
        ModelFilesError,
        ParityError,
        UnsupportedModelError,
    )
    from encoder_fast.parity import check_parity
    from encoder_fast.patching import patch, patched, report, unpatch
    from encoder_fast.text import TextEncoder

__all__ = [
    "BackendUnavailableError",
    "FallbackError",
    "ModelFilesError",
    "ParityError",
    "TextEncoder",
    "UnsupportedModelError",
    "__version__",
    "check_parity",
    "info",
    "patch",
    "patched",
    "report",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'encoder_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
