"""What every test relies on: where kernels run, and that nothing reaches for the network."""

import os
import signal
from collections.abc import Generator

import on_gpu
import pytest
import torch

# Before triton is imported anywhere: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("TRITON_INTERPRET") == "1":
    from triton_interpreter import repair_interpreter

    repair_interpreter()
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

# A shell starts what runs in the background with Ctrl-C ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each feed-forward of the engine has run over."""
    from encoder_fast.ops import linear

    seen: list[int] = []
    original = linear.run_feed_forward

    def spy(x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(x.shape[0])
        return original(x, *rest)

    monkeypatch.setattr(linear, "run_feed_forward", spy)
    return seen


@pytest.fixture(autouse=True, scope="session")
def _share_of_the_gpu() -> None:
    """What a worker's allocator keeps must leave room for the other workers."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if torch.cuda.is_available() and workers > 1:
        torch.cuda.set_per_process_memory_fraction(on_gpu.memory_share(workers))


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    has_gpu = torch.cuda.is_available()
    for item in items:
        if has_gpu and item.path.stem in on_gpu.WHOLE_FILES:
            item.add_marker(pytest.mark.gpu)
        elif not has_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))
    yield  # pytest leaves out what -m does not choose
    worker = getattr(config, "workerinput", {})
    # A worker is told that it has nothing to distribute; the command line says how it was done.
    if "worksteal" in worker.get("mainargv", ()):
        workers = worker["workercount"]
        items[:] = on_gpu.dealt(items, workers)
