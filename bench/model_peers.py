"""Who runs a whole model: encoder_fast, and every peer at its best setting."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import encoder_fast
from bench import exported
from bench.contestant import Unavailable, need
from bench.machine import Machine
from bench.models import ModelCase, build
from bench.sources import sources_of_model
from encoder_fast.graphs import GraphReport

Forward = Callable[[Mapping[str, Tensor]], Tensor]

OURS = "encoder_fast"
GRAPHS = "encoder_fast, CUDA graphs"
SDPA, EAGER = "Hugging Face SDPA", "Hugging Face eager"


@dataclass(frozen=True, slots=True)
class ModelPeer:
    """``build`` gives a function from a batch to the last hidden state, ``(B, S, N)``."""

    label: str
    build: Callable[[Machine, ModelCase, Mapping[str, Tensor]], Forward]
    sources: tuple[str, ...] = ()
    compiles: bool = False


def contestants(machine: Machine, case: ModelCase) -> Iterator[ModelPeer]:
    """Everybody for whom this case is meant, ours first."""
    default = machine.default_backend
    # What users get, which differs by model.
    chosen = default if machine.is_fake else "auto"
    yield ModelPeer(OURS, _ours(chosen), sources_of_model(default))
    if machine.kind != "cpu":
        for backend in machine.backends:
            # For DeBERTa `auto` takes the one for attention and the other for the rest.
            if backend != default or case.size.config_class.startswith("Deberta"):
                label = f"{OURS}, backend {backend}"
                yield ModelPeer(label, _ours(backend), sources_of_model(backend))
        sources = (*sources_of_model(default), "encoder_fast/graphs/")
        yield ModelPeer(GRAPHS, _replayed(chosen), sources)
    yield ModelPeer(EAGER, _hugging_face("eager"))
    if case.size.sdpa:
        yield ModelPeer(SDPA, _hugging_face("sdpa"))
        if machine.kind != "cpu":
            yield ModelPeer("Hugging Face flash attention", _flash_attention)
    if case.size.config_class == "DebertaV2Config" and machine.kind != "cpu":
        yield ModelPeer("flashdeberta", _flashdeberta)
        yield ModelPeer("disentangled-flash", _disentangled_flash)
    if case.exported and not machine.is_gpu and not machine.is_fake:
        yield ModelPeer("ONNX Runtime", _onnx_runtime)
        yield ModelPeer("OpenVINO", _openvino)
    for mode in case.compiled:
        label = "torch.compile" if mode == "default" else f"torch.compile {mode}"
        yield ModelPeer(label, _compiled(mode), compiles=True)


def _best_attention(case: ModelCase) -> str:
    return "sdpa" if case.size.sdpa else "eager"


def _plain(model: Any) -> Forward:
    return lambda inputs: model(**inputs).last_hidden_state


def _ours(backend: str) -> Callable[..., Forward]:
    def make(machine: Machine, case: ModelCase, inputs: Mapping[str, Tensor]) -> Forward:
        model = build(case, machine, _best_attention(case))
        return _plain(encoder_fast.patch(model, backend=backend, strict=True))

    return make


def _replayed(backend: str) -> Callable[..., Forward]:
    """The patched model with CUDA graphs, all of them recorded before a shape's first result."""

    def make(machine: Machine, case: ModelCase, inputs: Mapping[str, Tensor]) -> Forward:
        if not machine.is_gpu:
            raise Unavailable("CUDA graphs need an NVIDIA GPU")
        model = build(case, machine, _best_attention(case))
        encoder_fast.patch(model, backend=backend, cuda_graphs=True, strict=True)
        forward = _plain(model)
        recorded: set[torch.Size] = set()

        def replayed(inputs: Mapping[str, Tensor]) -> Tensor:
            shape = inputs["input_ids"].shape
            if shape not in recorded:
                _record(model, lambda: forward(inputs))
                recorded.add(shape)
            return forward(inputs)

        replayed(inputs)
        return replayed

    return make


def _record(model: Any, call: Callable[[], Tensor]) -> None:
    """Call until a graph is replayed, or say why none is."""
    before = _graphs(model)
    for _ in range(2):
        call()
    after = _graphs(model)
    if after.replayed == before.replayed:
        reasons = [r for r, n in after.without.items() if n > before.without.get(r, 0)]
        raise Unavailable(f"runs without a graph: {', '.join(reasons)}")


def _graphs(model: Any) -> GraphReport:
    graphs = encoder_fast.report(model).encoders[0].graphs
    assert graphs is not None
    return graphs


def _hugging_face(attention: str) -> Callable[..., Forward]:
    return lambda machine, case, inputs: _plain(build(case, machine, attention))


def _flash_attention(machine: Machine, case: ModelCase, inputs: Mapping[str, Tensor]) -> Forward:
    if case.dtype == torch.float32:
        raise Unavailable("flash attention runs half precision alone")
    for module, name in (("flash_attn_interface", "3"), ("flash_attn", "2")):
        if importlib.util.find_spec(module) is not None:
            return _plain(build(case, machine, f"flash_attention_{name}"))
    raise Unavailable("flash-attn is not installed")


def _compiled(mode: str) -> Callable[..., Forward]:
    def make(machine: Machine, case: ModelCase, inputs: Mapping[str, Tensor]) -> Forward:
        if machine.is_fake:
            raise Unavailable("nothing is compiled in miniature")
        import torch._inductor.config as inductor

        torch._dynamo.reset()
        model = build(case, machine, _best_attention(case))
        run = torch.compile(model, mode=mode, dynamic=False)
        # Weights as constants let inductor put them in oneDNN's layout once, at compile time.
        freezing = mode != "default" and not machine.is_gpu
        # Its search prints a table for each GEMM.
        with contextlib.redirect_stderr(io.StringIO()), inductor.patch(freezing=freezing):
            run(**inputs)

        def forward(inputs: Mapping[str, Tensor]) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return run(**inputs).last_hidden_state

        return forward

    return make


def _flashdeberta(machine: Machine, case: ModelCase, inputs: Mapping[str, Tensor]) -> Forward:
    need("flashdeberta")
    if not machine.is_gpu:
        raise Unavailable("flashdeberta needs an NVIDIA GPU")
    from flashdeberta import FlashDebertaV2Model

    source = build(case, machine)
    model = FlashDebertaV2Model(source.config)
    model.load_state_dict(source.state_dict())
    return _plain(model.eval().to(machine.device, case.dtype))


def _disentangled_flash(machine: Machine, case: ModelCase, inputs: Mapping[str, Tensor]) -> Forward:
    library = need("disentangled_flash", "disentangled-flash")
    if not machine.is_gpu:
        raise Unavailable("disentangled-flash needs an NVIDIA GPU")
    model = build(case, machine)
    library.optimize_deberta(model, sequence_lengths=[case.workload.longest])
    return _plain(model)


def _onnx_runtime(machine: Machine, case: ModelCase, inputs: Mapping[str, Tensor]) -> Forward:
    exported.forbid_dtype(case.dtype, torch.float32)
    # Its optimizer knows the eager graph of attention.
    return exported.onnx_runtime(build(case, machine, "eager"), inputs, machine.threads)


def _openvino(machine: Machine, case: ModelCase, inputs: Mapping[str, Tensor]) -> Forward:
    exported.forbid_dtype(case.dtype, torch.float32, torch.bfloat16)
    # It takes a float32 model and rounds by itself, here weights that are rounded already.
    model = build(case, machine, _best_attention(case)).float()
    return exported.openvino(model, inputs, machine.threads, case.dtype)
