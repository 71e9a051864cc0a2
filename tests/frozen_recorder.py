"""CUDA graphs of whole models without a GPU: what ran is kept, and exactly that runs again.

Recorded are PyTorch's operations, Triton's launches and, on the backend ``reference``, whose ops
look at their tensors, the calls of ops. Each is kept with its arguments: tensors by where they are,
numbers as they were. Run again, it writes into the tensors that it made the first time. So what a
CUDA graph would not see, this does not see either: another tensor in a place, another number. And
what a graph forbids fails here: a look at a value, a tensor made from the host's numbers.

What was made while recording is NaN before each replay: in a graph, nothing has run until then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from encoder_fast.graphs.recorder import CudaRecorder, Recording
from encoder_fast.ops._library import Operator

_FORBIDDEN = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "item", "lift_fresh"}


class _Tape(TorchDispatchMode):
    """What ran within the block."""

    active: ClassVar[_Tape | None] = None

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[Callable[[], None]] = []
        self._made: list[Tensor] = []

    def __enter__(self) -> Any:
        _Tape.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _Tape.active = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, schema = func.overloadpacket.__name__, func._schema
        assert name not in _FORBIDDEN, f"a CUDA graph can't hold {func}"
        out = func(*args, **kwargs or {})
        if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
            self._steps.append(lambda: func(*args, **kwargs or {}))
        elif not any(r.alias_info is not None for r in schema.returns):
            self._made += tree_leaves(out)
            if name not in ("empty", "new_empty", "empty_strided", "empty_like"):
                self._steps.append(lambda: _copy(out, func(*args, **kwargs or {})))
        return out

    def keep(self, call: Callable[[], Any]) -> Any:
        """Run one launch and keep it."""
        with _disable_current_modes():
            out = call()
        self._made += tree_leaves(out)
        self._steps.append(lambda: _copy(out, call()))
        return out

    def replay(self) -> None:
        for tensor in self._made:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.fill_(float("nan"))
        for step in self._steps:
            step()


def _copy(into: Any, made: Any) -> None:
    for old, new in zip(tree_leaves(into), tree_leaves(made), strict=True):
        if isinstance(old, Tensor):
            old.copy_(new)


class FrozenRecorder(CudaRecorder):
    """The recorder itself, over :mod:`fake_cuda`."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__(torch.device("cuda", 0))
        self.cuda = cuda
        self.reads: list[Sequence[Tensor]] = []

    def record(self, run: Callable[[], Tensor], reads: Sequence[Tensor]) -> Recording:
        # Tensors of the CPU know no streams.
        recording = super().record(run, [])
        self.reads.append(reads)
        return recording


def install(monkeypatch: pytest.MonkeyPatch) -> FrozenRecorder:
    """Models patched with ``cuda_graphs=True`` from here on use the recorder that is returned."""
    from triton.runtime.interpreter import GridExecutor

    cuda = FakeCuda(capture=_Tape)
    cuda.install(monkeypatch)
    recorder = FrozenRecorder(cuda)
    monkeypatch.setattr("encoder_fast.patching.state.recorder_for", lambda *_: recorder)
    run_op, launch = Operator.run, GridExecutor.__call__

    def run(self: Operator, *arguments: Any) -> Any:
        tape = _Tape.active
        if tape is None or arguments[-1] != "reference":
            return run_op(self, *arguments)
        return tape.keep(lambda: run_op(self, *arguments))

    def launch_and_keep(self: Any, *arguments: Any, **options: Any) -> Any:
        tape = _Tape.active
        if tape is None:
            return launch(self, *arguments, **options)
        return tape.keep(lambda: launch(self, *arguments, **options))

    monkeypatch.setattr(Operator, "run", run)
    monkeypatch.setattr(GridExecutor, "__call__", launch_and_keep)
    return recorder
