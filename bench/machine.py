"""Where a run measures, and everything about that place that a reader of its figures must know."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import encoder_fast
from encoder_fast.backends import resolve, why_not
from encoder_fast.backends.onednn import has_onednn

# What a figure may depend on: what ours runs on, and every peer.
PACKAGES = (
    *("torch", "triton", "transformers", "sentence-transformers", "numpy"),
    *("onnx", "onnxruntime", "openvino", "flash-attn", "flashdeberta", "disentangled-flash"),
    "liger-kernel",
)

_TIMED = ("cpu", "triton", "cuda")

_GPU_FACTS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


@dataclass(frozen=True, slots=True)
class Machine:
    """The device of a run.

    Attributes:
        device: where tensors live.
        name: the processor or GPU as its maker calls it.
        threads: CPU threads that PyTorch uses.
        is_fake: the GPU's grid in miniature, on the CPU through Triton's interpreter. Nothing
            measured there means anything; it keeps the GPU's code paths from rotting.
    """

    device: torch.device
    name: str
    threads: int
    is_fake: bool = False

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def kind(self) -> str:
        """Whose grid is run: ``cpu``, ``gpu`` or ``fake``."""
        if self.is_fake:
            return "fake"
        return "gpu" if self.is_gpu else "cpu"

    @property
    def slug(self) -> str:
        """The folder of its records."""
        name = self.name if self.is_gpu else f"{self.name} {self.threads} cores"
        words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return f"fake-{words}" if self.is_fake else words

    @property
    def backends(self) -> tuple[str, ...]:
        """Our backends worth timing here: neither the oracle nor an emulation is."""
        if self.is_fake:
            return ("triton",)
        return tuple(name for name in _TIMED if why_not(name, self.device) is None)

    @property
    def default_backend(self) -> str:
        """What ``auto`` chooses, the one that users get."""
        return "triton" if self.is_fake else resolve("auto", self.device)[0]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What people run here: float32 and, with the instructions for it, bfloat16 on a CPU."""
        if self.is_gpu:
            return torch.float16, torch.bfloat16, torch.float32
        if self.is_fake or not has_onednn(torch.bfloat16):
            return (torch.float32,)
        return torch.float32, torch.bfloat16

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    @property
    def has_lost_context(self) -> bool:
        """Whether each further call of CUDA would fail, as after an illegal access."""
        try:
            self.synchronize()
        except RuntimeError:
            return True
        return False

    def facts(self) -> dict[str, Any]:
        """For the record: processor, driver, clocks, versions. No path and no name of this host."""
        facts: dict[str, Any] = {
            "device": self.name,
            "kind": self.kind,
            "processor": processor(),
            "threads": self.threads,
            "cpu_mhz": _cpu_mhz(),
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "versions": versions(),
        }
        if self.is_gpu:
            facts["gpu"] = gpu_facts()
            facts["cuda"] = torch.version.cuda
            facts["cudnn"] = torch.backends.cudnn.version()
        return facts


def find_machine(*, fake: bool = False, threads: int | None = None) -> Machine:
    """The GPU where there is one that encoder_fast can use, else the CPU."""
    if threads is not None:
        torch.set_num_threads(threads)
    threads = torch.get_num_threads()
    gpu = torch.device("cuda")
    if not fake and torch.cuda.is_available() and why_not("triton", gpu) is None:
        return Machine(gpu, torch.cuda.get_device_name(gpu), threads)
    return Machine(torch.device("cpu"), processor(), threads, is_fake=fake)


def processor() -> str:
    """The processor's name as Linux has it; elsewhere its architecture."""
    names = _cpuinfo("model name")
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    found = {"encoder-fast": encoder_fast.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def gpu_facts() -> dict[str, str]:
    """Driver, clocks and power limit as the driver's own tool has them; empty without it."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_GPU_FACTS)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = answer.splitlines()[0].split(",")
    return {name: value.strip() for name, value in zip(_GPU_FACTS, values, strict=True)}


def _cpu_mhz() -> str:
    values = sorted(float(value) for value in _cpuinfo("cpu MHz"))
    return f"{values[0]:.0f} to {values[-1]:.0f}" if values else "unknown"


def _cpuinfo(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
