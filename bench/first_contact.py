"""The first quarter of an hour on a GPU as one command: ``make first-contact OUT=folder``.

Builds, tests, sweeps, sanitizes and measures, in the order that tells most first. Each step has a
limit, and a step that fails or is stopped does not keep the next from running. All that it writes
goes into one folder, as it comes, so that it may be cut at any moment: ``log.txt`` has a line when
a step starts and one when it ends, with its status, seconds and last line; a step's output is in
the file that the log names; ``bench`` leaves its record there too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Seconds for a step to end by itself when its time is up.
_GRACE = 4


@dataclass(frozen=True)
class Step:
    """A command with a limit.

    Attributes:
        predicted: seconds on 16 cores with an H100, computed and not measured.
        file: where its output goes, without the suffix; steps that run in turn may share one.
        beside: it starts and the next step does not wait for it.
        alone: it starts when nothing runs beside it any more.
    """

    name: str
    limit: int
    predicted: int
    command: Sequence[str]
    file: str
    environment: Mapping[str, str] = field(default_factory=dict)
    beside: bool = False
    alone: bool = False


def steps(out: Path) -> tuple[Step, ...]:
    """All of them. Those that run one after another take 450 seconds at the most."""
    python = sys.executable
    bench = [python, "-m", "bench"]
    tests = [python, "tests/on_gpu.py"]
    one_thread = {"OMP_NUM_THREADS": "1"}
    # An address beyond a tensor's own block is seen only where PyTorch keeps no larger ones.
    no_cache = {**one_thread, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def sweep(backend: str) -> Step:
        # Apart: a backend that breaks the CUDA context does not cost the other's figures.
        return Step(backend, 20, 17, [*bench, "sweep", "--backend", backend], "figures")

    def sanitizer(tool: str) -> Step:
        command = [*_sanitizer(tool), *bench, "sweep", "--check", "--backend", "cuda"]
        return Step(tool, 100, 60, command, tool, no_cache, beside=True)

    # python -m bench carry
    minilm = ROOT / ".cache" / "minilm-fp16"
    model = ["--model", str(minilm)] if minilm.is_dir() else []
    measure = [*bench, "all", "--quick", "--out", str(out), *model]
    return (
        Step("machine", 45, 20, _in_shell(_MACHINE), "figures", beside=True),
        Step("build", 45, 30, _in_shell(_BUILD), "build"),
        Step("kernels", 95, 80, [*tests, "kernels", "-v"], "tests", one_thread, alone=True),
        sweep("triton"),
        sweep("cuda"),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Step("models", 70, 55, [*tests, "models", "-v"], "tests", one_thread),
        Step("graphs", 30, 25, [*tests, "graphs", "-v"], "tests", one_thread),
        Step("bench", 170, 165, measure, "figures", alone=True),
    )


# The first import of PyTorch on a machine reads gigabytes; nvcc works meanwhile.
_MACHINE = """
nvidia-smi
"$PYTHON" -m pip --disable-pip-version-check list
"$PYTHON" -c 'import torch, transformers, triton; print("torch", torch.__version__)'
"""

# Each by itself: if one fails or is slow, the other is still there.
_BUILD = """
ENCODER_FAST_BUILD_CUDA=0 "$PYTHON" setup.py -q build_ext --inplace &
ENCODER_FAST_BUILD_CPU=0 "$PYTHON" setup.py -q build_ext --inplace
status=$?
wait
exit $status
"""


def _in_shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def _sanitizer(tool: str) -> list[str]:
    """compute-sanitizer over our kernels alone: PyTorch's would take all of the time."""
    program = "compute-sanitizer"
    told = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "50"]
    if shutil.which(program) is None:
        return told
    options = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    # The second is what versions before 2024 call it.
    for name in ("--kernel-name", "--kernel-regex"):
        if name in options.stdout:
            return [*told, name, "kns=encoder_fast"]
    return told


class Run:
    """Runs steps and keeps the log."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._out = out
        self._start = time.monotonic()
        self._running: list[_Running] = []
        self.failed: list[str] = []

    def all(self, todo: Sequence[Step]) -> None:
        try:
            for step in todo:
                if step.alone:
                    self._wait_for_those_beside()
                running = self._begin(step)
                if not step.beside:
                    self._end(running)
                    self._wait_for_those_beside(only_ended=True)
            self._wait_for_those_beside()
        except KeyboardInterrupt:
            self._say("stopped")
            raise
        finally:
            # Nothing may go on on the card.
            for running in self._running:
                running.stop()

    def _begin(self, step: Step) -> _Running:
        self._say(f"{step.name}: started, at most {step.limit} s, into {step.file}.txt")
        running = _Running(step, self._out)
        self._running.append(running)
        return running

    def _wait_for_those_beside(self, *, only_ended: bool = False) -> None:
        for running in list(self._running):
            if not only_ended or running.has_ended:
                self._end(running)

    def _end(self, running: _Running) -> None:
        status, seconds, last = running.wait()
        self._running.remove(running)
        if status != 0:
            self.failed.append(running.step.name)
        self._say(f"{running.step.name}: rc {status}, {seconds:.0f} s, {last[:150]}")

    def _say(self, text: str) -> None:
        line = f"[{time.monotonic() - self._start:4.0f} s] {text}"
        print(line, flush=True)
        with (self._out / "log.txt").open("a") as log:
            log.write(line + "\n")


class _Running:
    """A step's process, with its own group: workers end with it."""

    def __init__(self, step: Step, out: Path) -> None:
        self.step = step
        self._start = time.monotonic()
        self._path = out / f"{step.file}.txt"
        self._file = self._path.open("ab")
        self._file.write(f"\n===== {step.name}\n".encode())
        self._file.flush()
        self._begin = self._path.stat().st_size
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**os.environ, **_ENVIRONMENT, **step.environment},
                stdin=subprocess.DEVNULL,
                stdout=self._file,
                stderr=subprocess.STDOUT,
                # In our session: whatever ends that ends the step too.
                process_group=0,
            )
        except OSError as error:
            self._process = None
            self._file.write(f"{error}\n".encode())

    @property
    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def wait(self) -> tuple[int, float, str]:
        """Status, seconds and last line; 124 when its time was up."""
        status = 127
        if self._process is not None:
            left = self.step.limit - (time.monotonic() - self._start)
            try:
                status = self._process.wait(max(0, left))
            except subprocess.TimeoutExpired:
                status = 124
            self.stop()
        self._file.close()
        with self._path.open("rb") as file:
            file.seek(self._begin)
            lines = file.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        return status, time.monotonic() - self._start, last.strip()

    def stop(self) -> None:
        """End it, and what it started and left behind."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGINT)
            self._process.wait(_GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHON": sys.executable,
    "ENCODER_FAST_BUILD_CUDA": os.environ.get("ENCODER_FAST_BUILD_CUDA", "1"),
    "ENCODER_FAST_CUDA_ARCHS": os.environ.get("ENCODER_FAST_CUDA_ARCHS", "native"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for all that is written")
    out = parser.parse_args().out.resolve()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    run = Run(out)
    try:
        run.all(steps(out))
    except KeyboardInterrupt:
        return 130
    print(f"not right: {', '.join(run.failed)}" if run.failed else "all steps ended well")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
