"""What a forward costs the host where a CUDA graph does the rest: ``python -m bench.host``.

Runs on a CPU: the graphs hold nothing, and reading a mask, which is two launches of Triton's and
one wait, gives what was found the first time. So what is timed is Python, and the operations of
PyTorch around a replay. On a GPU each of those is a launch and takes some microseconds more.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

ROUNDS, CALLS = 300, 5


def main(rounds: int = ROUNDS) -> None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
    model, call = patched_bert(), tokenized()
    with torch.inference_mode():
        for _ in range(3):
            model(**call)
        print(f"{'us a call':<34}{'median':>10}{'fastest':>10}", flush=True)
        for name, part in parts_of(model, call).items():
            median, fastest = microseconds(part, rounds)
            print(f"{name:<34}{median:>10.1f}{fastest:>10.1f}")


def patched_bert() -> Any:
    """BERT-base over random weights, with graphs that hold nothing."""
    import encoder_fast
    from encoder_fast import backends, weights
    from encoder_fast.backends import reference
    from encoder_fast.patching import state

    kernels: Any = ModuleType("kernels")
    kernels.__dict__.update(vars(reference), RECORDABLE=True)
    kernels.count_tokens = remembered(reference.count_tokens)
    kernels.place_tokens = remembered(reference.place_tokens)
    backends._loaded["triton"] = kernels
    state.recorder_for = lambda *_: NullRecorder()
    weights.REWRITE_TOKENS = 1 << 60  # a copy, which is the GPU's work
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=1000)).eval()
    return encoder_fast.patch(model, "triton", cuda_graphs=True, strict=True)


class NullRecorder:
    """Records nothing, and replays it."""

    def why_not_now(self) -> None:
        return None

    def turn(self) -> Any:
        return nullcontext()

    def record(self, run: Callable[[], Tensor], inputs: Any) -> Any:
        return SimpleNamespace(output=run(), replay=lambda: None)


def remembered(read: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[int, Any] = {}

    def again(mask: Tensor, *rest: Any) -> Any:
        if mask.data_ptr() not in known:
            known[mask.data_ptr()] = read(mask, *rest)
        return known[mask.data_ptr()]

    return again


def tokenized() -> dict[str, Tensor]:
    """Four texts of 32 tokens or fewer, as a tokenizer gives them."""
    mask = (torch.arange(32) < torch.tensor([32, 17, 9, 25])[:, None]).long()
    return {"input_ids": mask * 7, "attention_mask": mask, "token_type_ids": mask * 0}


def parts_of(model: Any, call: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """The call, and its parts one by one."""
    from encoder_fast.patching import state as steps

    state: Any = model.__dict__["_encoder_fast"]
    reading = state._reading
    spec, backend, graphs = reading.spec, reading.backend, reading.graphs
    arguments = steps.read_arguments(state.original, model.config, (), call)
    readers = state.surroundings.readers(model)
    batch = steps.pack_call(arguments, spec, backend, True, readers)
    hidden = torch.zeros(batch.total, 768)
    padded = batch.unpack(hidden)
    inputs = steps.inputs_of(arguments, spec, batch)
    replayed = graphs.replay_ahead(inputs, False)
    return {
        "the whole call": lambda: model(**call),
        "is the model unchanged": lambda: reading.still_holds(model, state.original),
        "was the graph right": lambda: graphs.confirm(replayed),
        "arguments": lambda: steps.read_arguments(state.original, model.config, (), call),
        "mode": lambda: steps._check_mode(model),
        "who reads the output": lambda: state.surroundings.readers(model),
        "attention implementation": lambda: reading.check_attention(model.config),
        "tensors and mask": lambda: steps.pack_call(arguments, spec, backend, True, readers),
        "packing, launching, copying out": lambda: graphs.replay_ahead(inputs, False),
        "unpacking": lambda: batch.unpack(hidden),
        "the model's own pooler": lambda: state._pool_first(model, padded),
        "output": lambda: state._output(arguments, padded, padded, None),
    }


def microseconds(part: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """A call's median, and what the fastest tenth stay below: on a busy machine that says more."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(CALLS):
            part()
        seconds.append((time.perf_counter() - start) / CALLS)
    return statistics.median(seconds) * 1e6, statistics.quantiles(seconds, n=10)[0] * 1e6


if __name__ == "__main__":
    main()
