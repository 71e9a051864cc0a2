"""Compiles what a search will launch in processes side by side, so that one process only measures.

Triton keeps compiled code on disk, by what went into it: the process that measures finds it there.
A launcher compiles when it launches, so each process launches once, on the card.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from bench.op_case import OpCase
from bench.ops import OPS


@dataclass(frozen=True, slots=True)
class Job:
    """A launch of an op under a configuration; ``None`` for the launcher's own."""

    kernel: str
    shape_class: str
    case: OpCase
    config: dict[str, Any] | None


def processes() -> int:
    """One for each core but two: compiling starts an assembler too."""
    return max(1, len(os.sched_getaffinity(0)) - 2)


def compile_ahead(jobs: Sequence[Job], device: torch.device) -> None:
    """Launch all jobs once, in as many processes as there are cores."""
    # A forked process could not use the card.
    context = multiprocessing.get_context("spawn")
    with (
        # What a process that died leaves undone, the search compiles itself.
        suppress(BrokenExecutor),
        ProcessPoolExecutor(min(processes(), max(1, len(jobs))), context) as pool,
    ):
        for _ in pool.map(launch, jobs, [str(device)] * len(jobs)):
            pass


@torch.inference_mode()
def launch(job: Job, device: str) -> None:
    from encoder_fast.kernels import launch_table

    op = OPS[job.case.op]
    call = op.ours(op.inputs(job.case, torch.device(device)), "triton")
    forced = launch_table.forced(job.kernel, job.shape_class, job.config or {})
    # The search meets what does not fit the card again, and says so.
    with forced if job.config is not None else nullcontext(), suppress(Exception):
        call()
