"""The backend `cuda` beyond the numbers of its ops: what it refuses, its activation kernel, whole
models, and how `auto` comes to choose it."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace

import cuda_host_build
import pytest
import torch
import torch.nn.functional as F
from berts import DTYPES, tiny
from disentangled_oracle import problem
from kernel_backends import DEVICE, kernel_backends
from layer_norm_oracle import surrounded_by_nan
from torch import Tensor

import encoder_fast
from encoder_fast import backends
from encoder_fast.backends import cuda_kernels, load, measurements, resolve
from encoder_fast.backends.cuda_kernels import CudaKernels
from encoder_fast.errors import BackendUnavailableError, UnsupportedModelError
from encoder_fast.ops import attention as attention_op
from encoder_fast.ops import disentangled_attention
from encoder_fast.ops.add_layer_norm import add_layer_norm
from encoder_fast.ops.attention import attention
from encoder_fast.ops.linear import linear
from encoder_fast.parity import compare

CUDA = next((name for name in kernel_backends() if name.startswith("cuda")), None)
pytestmark = pytest.mark.skipif(CUDA is None, reason="the CUDA sources are not compiled here")

# Of the extension, those that launch.
FUNCTIONS = (
    *("disentangled_attention", "attention"),
    *("add_layer_norm", "embed_layer_norm", "bias_gelu"),
)

CU = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)


def random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def packed(heads: int = 2, size: int = 32, dtype: torch.dtype = torch.float16) -> Tensor:
    return random(4, heads, size, dtype=dtype)


def attend(q: Tensor, k: Tensor | None = None) -> Tensor:
    return attention(q, q if k is None else k, q, CU, 4, backend=str(CUDA))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attend(packed(dtype=torch.float32)), "in attention, got torch.float32"),
        (lambda: attend(packed(size=16)), r"runs head sizes \[32, 64, 128\] in attention, got 16"),
        # Both would be read by misaligned accesses of 16 bytes.
        (
            lambda: attend(random(4, 2 * 36)[:, : 2 * 36].view(4, 2, 36)[..., :32]),
            "q's head stride must be a multiple of 8, got 36",
        ),
        (
            lambda: attend(packed(), random(4, 2 * 32 + 4)[:, :64].unflatten(1, (2, 32))),
            "k's row stride must be a multiple of 8, got 68",
        ),
        (
            lambda: attend(random(4 * 64 + 1)[1:].view(4, 2, 32)),
            "q must begin at a multiple of them, got address",
        ),
        (
            lambda: add_layer_norm(
                random(2, 8), weight=random(8, dtype=torch.float64), backend=str(CUDA)
            ),
            "weight must be one of .*float16.*, got torch.float64",
        ),
        (lambda: add_layer_norm(random(2, 8200), backend=str(CUDA)), "up to 8192 wide, got 8200"),
    ],
)
def test_what_it_cannot_run_is_an_error(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_strides_of_a_dimension_of_one_do_not_matter() -> None:
    q = random(4 * 33)[: 4 * 32].view(4, 1, 32).as_strided((4, 1, 32), (32, 33, 1))
    assert attend(q).isfinite().all()


def test_every_access_is_checked_by_the_emulation() -> None:
    """What a kernel may touch is what the tensors cover, and not the memory beside it."""
    if CUDA != "cuda-host":
        pytest.skip("kernels run on the GPU here")
    extension = cuda_host_build.build_backend()

    class Blind(ModuleType):
        """The extension, told that x is one row shorter than it is."""

        def __getattr__(self, name):
            return getattr(extension, name)

        def allow(self, address, rows, row_bytes, stride, written):
            extension.allow(address, rows - (rows == 5), row_bytes, stride, written)

    kernels = CudaKernels(Blind("_cuda_host"))
    x = random(5, 64)
    with pytest.raises(RuntimeError, match=r"add_layer_norm of \(5, 64\), block .* outside every"):
        kernels.add_layer_norm(x, None, None, None, 1e-12, None)
    # What was allowed to the launch that failed is forbidden again.
    expected = load("cuda-host").add_layer_norm(x, None, None, None, 1e-12, None)
    assert torch.equal(add_layer_norm(x, backend="cuda-host"), expected)


def test_launches_go_where_pytorchs_would(monkeypatch: pytest.MonkeyPatch) -> None:
    if CUDA != "cuda-host":
        pytest.skip("kernels run on the GPU here")

    def current_stream(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=1000 + device.index)

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    operand = SimpleNamespace(device=torch.device("cuda", 3))
    assert cuda_kernels._place(operand) == (3, 1003)

    # The last two things that the extension is told; the emulation has but one place.
    places = []

    class Watched(ModuleType):
        def __getattr__(self, name):
            def call(*arguments):
                places.append((name, arguments[-2:]))

            return call if name in FUNCTIONS else getattr(cuda_host_build.build_backend(), name)

    monkeypatch.setattr(cuda_kernels, "_place", lambda like: (3, 1003))
    kernels = CudaKernels(Watched("_cuda_host"))
    one, x = problem((5,), torch.float16, device=DEVICE), random(5, 64)
    kernels.disentangled_attention(*one.arguments)
    kernels.attention(one.q, one.k, one.v, one.cu_seqlens, 5, 0.2)
    kernels.add_layer_norm(x, None, None, None, 1e-12, None)
    kernels.embed_layer_norm(torch.arange(5), None, None, x, None, None, None, None, 1e-12)
    kernels.linear(x, x, None, "gelu")
    assert places == [(name, (3, 1003)) for name in FUNCTIONS]


# A width of full accesses over one block and over two, one of single elements, and one column.
@pytest.mark.parametrize("width", [1, 100, 3072, 4099])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gelu(dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = random(rows, 8, dtype=dtype), random(width, 8, dtype=dtype)
    bias = surrounded_by_nan(random(1, width, dtype=dtype))[0]
    output = linear(x, weight, bias, activation="gelu", backend=str(CUDA))
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    row = compare("gelu", output, F.gelu(F.linear(x, weight, bias)), exact)
    assert row.ok, row


# One input feature, so that the GEMM is exact: every float16 and bfloat16 there is.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gelu_of_every_number(dtype: torch.dtype) -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)[:, None].to(DEVICE)
    output = linear(x, x.new_ones(1, 1), activation="gelu", backend=str(CUDA)).cpu()
    wide = x.double().cpu()
    # Without the cancellation of 1 + erf.
    exact = (0.5 * wide * torch.special.erfc(-wide * 0.5**0.5)).to(dtype)
    eager = F.gelu(x).cpu()
    # -inf * 0 is NaN, in PyTorch too.
    assert torch.equal(output.isnan(), wide.isnan() | (wide == -torch.inf))
    assert torch.equal(output.isinf(), wide == torch.inf)
    known = exact.isfinite()
    step = torch.finfo(dtype).eps * exact[known].double().abs()
    error = (output[known].double() - exact[known].double()).abs()
    # One rounding step, or the polynomial's 3.3e-7 where that is more, in the tail below -3.
    assert (error <= torch.maximum(step, torch.tensor(4e-7, dtype=torch.float64))).all()
    assert (output != exact)[known].sum() <= (eager != exact)[known].sum(), "nearer than PyTorch"


def test_gelu_of_nothing() -> None:
    for rows, width in ((0, 8), (3, 0)):
        weight = random(width, 8)
        output = linear(random(rows, 8), weight, activation="gelu", backend=str(CUDA))
        assert output.shape == (rows, width)


def test_a_whole_model_runs_and_comes_back() -> None:
    # 2 heads of 32, for heads of 16 have no kernel.
    model = tiny(hidden_size=64, num_attention_heads=2, intermediate_size=96).half().to(DEVICE)
    ids = torch.randint(1, 97, (3, 19), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, :3] = 0  # and the pooler reads what stands in column 0 there
    inputs = {"input_ids": ids, "attention_mask": mask}
    parity = encoder_fast.check_parity(model, inputs, backend=str(CUDA))
    assert parity.ok, parity
    encoder_fast.patch(model, backend=str(CUDA), strict=True)
    with torch.inference_mode():
        model(**inputs)
    assert encoder_fast.report(model).encoders[0].backend == CUDA
    encoder_fast.unpatch(model)


def test_a_model_with_other_heads_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="head sizes"):
        encoder_fast.patch(tiny().half().to(DEVICE), backend=str(CUDA))


def test_no_backend_where_there_is_no_gpu() -> None:
    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailableError, match=r"_cuda is not built|needs an NVIDIA GPU"):
        add_layer_norm(random(2, 8), backend="cuda")
    state = encoder_fast.info().backends
    assert "cuda-host" not in state
    assert "is not built" in state["cuda"] or "NVIDIA GPU" in state["cuda"]


def test_an_extension_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError("libstdc++.so.6: version not found")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", fail)
    reason = backends.why_not("cuda", torch.device("cuda"))
    assert reason == (
        "the extension encoder_fast._cuda does not load: libstdc++.so.6: version not found"
    )


@pytest.fixture
def faked_table(monkeypatch: pytest.MonkeyPatch) -> str:
    """Measurements by which CUDA wins for heads of 32 and 64 tokens, and at N = 768."""
    architecture = measurements.architecture(torch.device(DEVICE))
    table = {
        architecture: {
            "attention": {"float16": {"D32-S64": str(CUDA)}},
            "add_layer_norm": {"float16": {"N768": str(CUDA)}, "float32": {"N768": "triton"}},
        }
    }
    monkeypatch.setattr(measurements, "TABLE", table)
    return architecture


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends whose ops were called, as they are."""
    called: list[str] = []
    for name in ("triton", str(CUDA)):
        for op in ("attention", "disentangled_attention", "add_layer_norm"):
            original = getattr(load(name), op)

            def record(*arguments, name=name, original=original):
                called.append(name)
                return original(*arguments)

            monkeypatch.setattr(load(name), op, record)
    return called


@pytest.mark.parametrize(
    ("size", "tokens", "dtype", "winner"),
    [
        (32, 33, torch.float16, CUDA),
        (32, 64, torch.float16, CUDA),
        (32, 32, torch.float16, "triton"),
        (32, 65, torch.float16, "triton"),
        (64, 64, torch.float16, "triton"),
        (32, 64, torch.bfloat16, "triton"),
    ],
)
def test_measured_attention(faked_table, calls, size, tokens, dtype, winner) -> None:
    q = random(tokens, 1, size, dtype=dtype)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
    load("measured").attention(q, q, q, cu_seqlens, tokens, 0.2)
    assert calls == [winner]


@pytest.mark.parametrize(
    ("width", "dtype", "winner"),
    [
        (768, torch.float16, CUDA),
        (513, torch.float16, CUDA),
        (512, torch.float16, "triton"),
        (768, torch.float32, "triton"),
    ],
)
def test_measured_norm(faked_table, calls, width, dtype, winner) -> None:
    x = random(2, width, dtype=dtype)
    load("measured").add_layer_norm(x, None, None, None, 1e-12, None)
    assert calls == [winner]


def test_auto_says_what_it_chose(faked_table, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "why_not", lambda name, device: None)
    monkeypatch.setattr(measurements, "architecture", lambda device: faked_table)
    if CUDA != "cuda":  # nothing in the table is of `cuda`
        assert resolve("auto", gpu)[0] == "triton"
        table = {faked_table: {"attention": {"float16": {"D32-S64": "cuda"}}}}
        monkeypatch.setattr(measurements, "TABLE", table)
    name, why = resolve("auto", gpu)
    assert name == "measured"
    assert why.startswith("auto: as measured, attention")

    monkeypatch.setattr(backends, "why_not", lambda n, device: "no" if n == "cuda" else None)
    assert resolve("auto", gpu)[0] == "triton", "the extension is not there"


@pytest.mark.parametrize(
    ("size", "dtype", "winner"),
    [
        (32, torch.float16, CUDA),
        (64, torch.bfloat16, CUDA),
        (64, torch.float32, "triton"),
        (128, torch.float16, "triton"),
    ],
)
def test_predicted_attention(calls, monkeypatch, size, dtype, winner) -> None:
    monkeypatch.setattr(measurements, "TABLE", {})
    if CUDA != "cuda":
        monkeypatch.setattr(measurements, "winner", lambda *call: str(CUDA))
    monkeypatch.setattr("encoder_fast.ops._library.why_not", lambda *_: None)  # for want of a GPU
    one = problem((5,), dtype, heads=1, head_dim=size, device=DEVICE)
    load("measured").disentangled_attention(*one.arguments)
    assert calls == [winner]


def test_auto_copies_what_cuda_does_not_read(calls, monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem((5,), torch.float16, heads=1, device=DEVICE)
    apart = torch.zeros(5, 1, 33, dtype=torch.float16, device=DEVICE)
    for op in (attention_op, disentangled_attention):
        monkeypatch.setattr(op, "resolve", lambda *call: ("measured", ""))
    monkeypatch.setattr(measurements, "TABLE", {})
    monkeypatch.setattr(measurements, "winner", lambda *call: str(CUDA))
    monkeypatch.setattr("encoder_fast.ops._library.why_not", lambda *_: None)  # for want of a GPU
    for k in (one.k[:5], apart[:, :, :32]):
        attention(one.q[:5], k, one.v[:5], one.cu_seqlens, 5)
        disentangled_attention.disentangled_attention(
            *(one.q[:5], k, one.v[:5], one.cu_seqlens, 5, one.row_of_distance),
            pos_key=one.pos_key,
            pos_query=one.pos_query,
        )
    assert calls == [CUDA, CUDA, CUDA, "triton", CUDA, "triton"]


def test_auto_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """No op looks at addresses before the dispatcher, where torch.compile has none."""
    one = problem((5,), torch.float16, heads=1, tail=0, device=DEVICE)
    for op in (attention_op, disentangled_attention):
        monkeypatch.setattr(op, "resolve", lambda *call: ("measured", ""))
    monkeypatch.setattr(measurements, "winner", lambda *call: str(CUDA))
    monkeypatch.setattr("encoder_fast.ops._library.why_not", lambda *_: None)  # for want of a GPU

    places = one.cu_seqlens, one.longest
    positions = {"pos_key": one.pos_key, "pos_query": one.pos_query}

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        plain = attention(q, k, v, *places)
        return plain, disentangled_attention.disentangled_attention(
            q, k, v, *places, one.row_of_distance, **positions
        )

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    expected = both(one.q, one.k, one.v)
    assert all(map(torch.equal, compiled(one.q, one.k, one.v), expected))


def test_autos_choice_is_a_constant_for_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, needs = torch.device("cuda", 0), frozenset({"disentangled_attention"})
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def add_names(x: Tensor) -> Tensor:
        return x + len(resolve("auto", gpu)[0] + resolve("auto", gpu, needs)[0])

    x = torch.zeros(2)
    try:
        compiled = torch.compile(add_names, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), add_names(x))
    finally:
        measurements.architecture.cache_clear()


def test_a_record_overrides_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, dtype = torch.device("cuda", 0), torch.float16
    op, needs = "disentangled_attention", frozenset({"disentangled_attention", "rotary"})
    monkeypatch.setattr(backends, "why_not", lambda name, device: None)
    monkeypatch.setattr(measurements, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(measurements, "TABLE", {})
    assert resolve("auto", gpu) == ("triton", "auto: the backend for cuda")
    assert resolve("auto", gpu, needs) == (
        "measured",
        "auto: as predicted, disentangled_attention on cuda; the rest on triton",
    )
    assert measurements.winner(op, gpu, dtype, "D64-S512") == "cuda"
    measured = {op: {"float16": {"D64-S512": "triton", "D64-S256": "cuda"}}}
    monkeypatch.setattr(measurements, "TABLE", {"sm_90": measured})
    assert measurements.winner(op, gpu, dtype, "D64-S512") == "triton"
    assert "predicted" not in resolve("auto", gpu, needs)[1]


def test_measurements_are_of_known_shapes() -> None:
    """What is committed: nothing that no call would ever look up."""
    sizes = {measurements.norm_class(n) for n in measurements.SIZES}
    lengths = {measurements.attention_class(0, s)[2:] for s in measurements.LENGTHS}
    for ops in measurements.TABLE.values():
        for op, by_dtype in ops.items():
            for dtype, shapes in by_dtype.items():
                assert hasattr(torch, dtype)
                for shape, winner in shapes.items():
                    assert winner in ("triton", "cuda")
                    known = lengths if "attention" in op else sizes
                    assert shape.removeprefix("D").lstrip("0123456789") in known or shape in known
