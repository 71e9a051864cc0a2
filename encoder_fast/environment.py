"""What is installed here, what runs, and why something does not."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

import encoder_fast
from encoder_fast.backends import NAMES, why_not


@dataclass(frozen=True)
class Info:
    """What :func:`info` returns; ``print`` it.

    Attributes:
        versions: package name to version, ``"not installed"`` where it is missing.
        platform: the operating system and processor architecture.
        cpu: threads and the instructions that matter.
        devices: the NVIDIA GPUs that PyTorch sees.
        backends: backend name to ``"available"`` or the reason why not.
    """

    versions: dict[str, str]
    platform: str
    cpu: str
    devices: tuple[str, ...]
    backends: dict[str, str]

    def __str__(self) -> str:
        lines = [f"encoder_fast {self.versions['encoder_fast']} on {self.platform}"]
        lines += [f"  {name} {version}" for name, version in list(self.versions.items())[1:]]
        lines.append(f"  cpu: {self.cpu}")
        lines += [f"  gpu: {device}" for device in self.devices] or ["  gpu: none"]
        lines += [f"  backend {name}: {state}" for name, state in self.backends.items()]
        return "\n".join(lines)


def info() -> Info:
    """Versions, devices and backends of this installation, with the reason for each absence."""
    versions = {"encoder_fast": encoder_fast.__version__}
    for package in ("torch", "triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                f"{properties.name}, sm_{properties.major}{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB"
            )
    gpu_or_cpu = torch.device("cuda" if devices else "cpu")
    cpu = torch.device("cpu")
    backends = {
        name: why_not(name, gpu_or_cpu if name in ("triton", "cuda") else cpu) or "available"
        for name in NAMES
        if name != "cuda-host"
    }
    return Info(
        versions=versions,
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        cpu=_cpu(),
        devices=tuple(devices),
        backends=backends,
    )


def _cpu() -> str:
    from encoder_fast.backends import cpu_kernels
    from encoder_fast.backends.onednn import has_onednn

    fast = [
        str(dtype).removeprefix("torch.")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if has_onednn(dtype)
    ]
    return (
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"oneDNN linear in {', '.join(fast) or 'no dtype'}, "
        + (
            f"kernels for {cpu_kernels.instructions()}"
            if cpu_kernels.why_not() is None
            else f"no kernels of its own: {cpu_kernels.why_not()}"
        )
    )
