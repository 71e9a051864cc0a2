"""The backends with kernels of their own that can run here, for tests that go through all of them.

With a GPU these are `triton` and, where the extension is built, `cuda`. Without one Triton
interprets its kernels, and the CUDA sources are compiled for the CPU over an emulation of the GPU,
the backend `cuda-host`; the first call compiles them.
"""

from __future__ import annotations

import functools

import cuda_host_build
import torch

from encoder_fast.backends import why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def kernel_backends() -> tuple[str, ...]:
    """Names for `encoder_fast.backends.load`."""
    if DEVICE == "cpu" and cuda_host_build.why_not() is None:
        cuda_host_build.build_backend()
    names = ("triton", "cuda", "cuda-host")
    return tuple(name for name in names if why_not(name, torch.device(DEVICE)) is None)


@functools.cache
def model_backends() -> tuple[str, ...]:
    """What a whole model is patched with: each by name on a GPU, elsewhere what `auto` chooses."""
    if DEVICE == "cpu":
        return ("auto",)
    return kernel_backends()
