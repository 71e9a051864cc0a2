"""Models outside PyTorch on a CPU: ONNX Runtime and OpenVINO, each at its best setting."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.contestant import Unavailable, need

Forward = Callable[[Mapping[str, Tensor]], Tensor]

_NAMES = ("input_ids", "attention_mask")


class _LastHiddenState(nn.Module):
    """A model as a function of two tensors: what both exporters want."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def onnx_runtime(model: Any, inputs: Mapping[str, Tensor], threads: int) -> Forward:
    """Export by tracing, fuse by ONNX Runtime's own transformer optimizer, run on its CPU provider.

    The graph is one for all shapes. The optimizer makes single nodes of attention, LayerNorm and
    GELU where it knows the graph, BERT's above all; what it does not know stays as it was.
    """
    runtime = need("onnxruntime")
    need("onnx")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        axes = {name: {0: "batch", 1: "length"} for name in (*_NAMES, "out")}
        with _silence(), torch.no_grad():
            torch.onnx.export(
                _LastHiddenState(model).eval(),
                tuple(inputs[name] for name in _NAMES),
                str(path),
                input_names=list(_NAMES),
                output_names=["out"],
                dynamic_axes=axes,
                opset_version=17,
                dynamo=False,
            )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        fused = _fuse(path, model)
        session = runtime.InferenceSession(fused, options, providers=["CPUExecutionProvider"])

    def forward(inputs: Mapping[str, Tensor]) -> Tensor:
        feed = {name: inputs[name].numpy() for name in _NAMES}
        return torch.from_numpy(session.run(None, feed)[0])

    return forward


def _fuse(path: Path, model: Any) -> bytes:
    from onnxruntime.transformers import optimizer

    config = model.config
    heads = getattr(config, "num_attention_heads", None) or config.n_heads
    width = getattr(config, "hidden_size", None) or config.dim
    with _silence():
        graph = optimizer.optimize_model(
            str(path), "bert", num_heads=heads, hidden_size=width, opt_level=1
        )
    return graph.model.SerializeToString()


def openvino(model: Any, inputs: Mapping[str, Tensor], threads: int, dtype: torch.dtype) -> Forward:
    """Convert the model as it is, and compile it for this CPU in the dtype of the race."""
    library = need("openvino")
    hints = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    with _silence(), torch.no_grad():
        graph = library.convert_model(
            _LastHiddenState(model).eval(),
            example_input=tuple(inputs[name] for name in _NAMES),
        )
        compiled = library.Core().compile_model(
            graph,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": hints[dtype],
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": str(threads),
            },
        )
    request = compiled.create_infer_request()

    def forward(inputs: Mapping[str, Tensor]) -> Tensor:
        values = request.infer([inputs[name].numpy() for name in _NAMES], share_inputs=True)
        return torch.from_numpy(values[0])

    return forward


def forbid_dtype(dtype: torch.dtype, *known: torch.dtype) -> None:
    if dtype not in known:
        raise Unavailable(f"does not run {str(dtype).removeprefix('torch.')} on a CPU")


@contextlib.contextmanager
def _silence() -> Any:
    """The exporters speak of every cast and every constant that they meet."""
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(sink):
            yield
