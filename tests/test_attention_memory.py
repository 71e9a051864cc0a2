"""Attention takes no memory for the scores of a whole text, by what it adds to the peak.

Resident pages on a CPU, PyTorch's allocator on a GPU. The eager formula goes through the same
measurement and must exceed what ours may take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import zoo
from berts import DEVICE, DTYPES
from cpu_isas import MARKS
from test_ops import cumulative
from torch import nn

import encoder_fast
from bench.machine import Machine
from bench.memory import peak_memory
from encoder_fast.backends import cpu_attention, cpu_disentangled, cpu_kernels, load, why_not
from encoder_fast.ops.attention import attention
from encoder_fast.ops.disentangled_attention import disentangled_attention, make_row_of_distance

MIB = 1 << 20

# What is resident of PyTorch's code and tables, and malloc's and the system's rounding.
SLACK = 6 * MIB

ON_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="attention of the CPU")

# The CPU's attention by its own kernels, and where those can't run.
WAYS = [pytest.param("kernels", marks=MARKS), pytest.param("PyTorch", marks=ON_CPU)]
GPU_BACKENDS = [pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")]

OPTIONS = ("plain", "window-100", "bias-32")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Each thread has a scratch of its own, and a machine any number of threads."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the name of a backend, or of one of the CPU's ways."""
    if request.param == "kernels":
        assert cpu_kernels.isa > 0, cpu_kernels.why_not()
        monkeypatch.setattr(cpu_kernels, "_LEFT_TO_PYTORCH", ())
        monkeypatch.setattr(cpu_attention, "_most_scores", None)  # a call of it is an error
        return "cpu"
    if request.param == "PyTorch":
        monkeypatch.setattr(cpu_kernels, "isa", 0)
        return "cpu"
    reason = why_not(request.param, torch.device(DEVICE))
    if reason is not None:
        pytest.skip(reason)
    return request.param


def added(call: Callable[[int], object], length: int) -> int:
    """What ``call(length)`` adds to the memory in use at its highest, in bytes."""
    # Code, primitives and compiled kernels stay; a buffer kept from here would be a quarter.
    call(length // 2)
    with peak_memory(Machine(torch.device(DEVICE), "", 1)) as peak:
        call(length)
    if peak.added_bytes is None:
        pytest.skip("this system does not tell a process's peak of memory")
    return peak.added_bytes


def random_qkv(length: int, heads: int, size: int, dtype: str) -> torch.Tensor:
    return torch.randn(length, 3, heads, size, device=DEVICE).to(DTYPES[dtype])


def scores_bytes(qkv: torch.Tensor) -> int:
    length, _, heads, _ = qkv.shape
    return heads * length**2 * qkv.element_size()


def added_by_attention(qkv: torch.Tensor, backend: str, option: str = "plain") -> int:
    """Over one sequence."""
    kind, _, number = option.partition("-")
    window = int(number) if kind == "window" else None
    bias = None
    if kind == "bias":
        bias = torch.randn(qkv.shape[2], 2 * int(number) + 1, device=DEVICE).to(qkv.dtype)

    def attend(length: int) -> None:
        attention(
            *qkv[:length].unbind(1),
            cumulative([length]),
            length,
            window_size=window,
            relative_bias=bias,
            backend=backend,
        )

    return added(attend, len(qkv))


def added_by_eager(qkv: torch.Tensor) -> int:
    def attend(length: int) -> None:
        q, k, v = qkv[:length].permute(1, 2, 0, 3)
        torch.softmax(q @ k.mT, dim=-1) @ v

    return added(attend, len(qkv))


# One head, so that what is kept of any is seen; an eighth is less than a mask of bytes would take.
# Eager takes seconds in float16.
@ON_CPU
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_eager_has_all_scores(dtype: str) -> None:
    qkv = random_qkv(8192, 1, 64, dtype)
    assert added_by_eager(qkv) > scores_bytes(qkv)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", WAYS[:1], indirect=True)
def test_the_kernel_adds_its_output_and_a_scratch(backend: str, dtype: str, option: str) -> None:
    extension = cpu_kernels._extension
    assert extension is not None
    qkv = random_qkv(8192, 1, 64, dtype)
    # by the head's size alone, in floats
    scratch = 4 * extension.attention_workspace(64)
    limit = qkv.nbytes // 3 + scratch + SLACK
    assert limit < scores_bytes(qkv) / 8
    assert added_by_attention(qkv, backend, option) < limit


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", WAYS[1:], indirect=True)
def test_pytorch_adds_a_small_part_of_the_scores(backend: str, dtype: str, option: str) -> None:
    qkv = random_qkv(8192, 1, 64, dtype)
    assert added_by_attention(qkv, backend, option) < scores_bytes(qkv) / 8


# The longest that go by whole GEMMs; scores of 98 and 128 MB.
@pytest.mark.parametrize("option", ["plain", "bias-32"])
@pytest.mark.parametrize(("dtype", "length", "heads"), [("fp32", 448, 128), ("bf16", 2048, 16)])
@pytest.mark.parametrize("backend", WAYS[1:], indirect=True)
def test_gemms_have_the_scores_of_a_few_heads(
    backend: str, dtype: str, length: int, heads: int, option: str
) -> None:
    assert length == cpu_attention._CACHED_SCORES[DTYPES[dtype]][-1]
    qkv = random_qkv(length, heads, 16, dtype)
    # Beside the output: its parts and the queries, in reverse order for a bias.
    limit = cpu_attention._SCORES_BYTES + 5 * (qkv.nbytes // 3) + SLACK
    assert limit < scores_bytes(qkv) / 3
    assert added_by_attention(qkv, backend, option) < limit


def disentangled(qkv: torch.Tensor, backend: str) -> Callable[[int], None]:
    """DeBERTa's call over one sequence, with both terms of position."""
    tables = torch.randn(2, 512, *qkv.shape[2:], device=DEVICE).to(qkv.dtype)
    rows = make_row_of_distance(256, 0, 0, torch.device(DEVICE))

    def attend(length: int) -> None:
        disentangled_attention(
            *qkv[:length].unbind(1),
            cumulative([length]),
            length,
            rows,
            pos_key=tables[0],
            pos_query=tables[1],
            backend=backend,
        )

    return attend


# At DeBERTa's length. The CPU has whole matrices here, of two heads at least however long they are.
@ON_CPU
def test_disentangled_attention_has_the_scores_of_a_few_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qkv = random_qkv(512, 64, 16, "fp32")
    # each head's scores, and its products with all distances, twice as many, for two terms
    everything = 5 * scores_bytes(qkv)
    attend = disentangled(qkv, "cpu")
    assert added(attend, len(qkv)) < everything / 4
    monkeypatch.setattr(cpu_disentangled, "_CACHE_BYTES", everything)
    assert added(attend, len(qkv)) > everything / 2


def long_model(family: str, longest: int) -> tuple[nn.Module, Callable[[int], None]]:
    """A tiny model with 2 heads, and its forward over the end of one text."""
    model = zoo.build(
        family,
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=2 if family == "modernbert" else 1,  # the second has a window
        max_position_embeddings=longest + 2,  # MPNet counts from 2
        attn_implementation="eager",
    )
    ids = torch.randint(3, zoo.VOCAB, (1, longest), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[:, -9:] = 0

    @torch.inference_mode()
    def forward(length: int) -> None:
        model(input_ids=ids[:, -length:], attention_mask=mask[:, -length:])

    return model, forward


# Plain attention, a bias by distance, and a window.
FAMILIES = ("bert", "mpnet", "modernbert")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_eager_model_has_all_scores(family: str) -> None:
    _, forward = long_model(family, 2048)
    assert added(forward, 2048) > 2 * 2048**2 * 4


# Its hidden states and feed-forwards count too, 30 MB of ModernBERT's.
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", [*WAYS, *GPU_BACKENDS], indirect=True)
def test_a_patched_model_adds_less_than_a_mask_of_bytes(backend: str, family: str) -> None:
    if family != "bert" and backend == "cuda":
        pytest.skip("backend 'cuda' has plain attention alone")
    model, forward = long_model(family, 8192)
    if backend == "cuda":
        model.half()  # it has no float32
    encoder_fast.patch(model, backend=backend, strict=True)
    assert added(forward, 8192) < 8192**2


@pytest.mark.gpu
@pytest.mark.parametrize("option", [*OPTIONS, "disentangled"])
@pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)
def test_a_gpu_adds_the_output(backend: str, option: str) -> None:
    kind = option.partition("-")[0]
    lacking = {"window": "window_size", "bias": "relative_bias"}
    lacking["disentangled"] = "disentangled_attention"
    if lacking.get(kind) in getattr(load(backend), "LACKING", ()):
        pytest.skip(f"backend {backend!r} lacks {lacking[kind]}")
    qkv = random_qkv(8192, 12, 64, "fp16")
    # and a list of tiles, or the bounds of one sequence
    limit = qkv.nbytes // 3 + MIB
    assert limit < scores_bytes(qkv) / 100
    if kind == "disentangled":
        assert added(disentangled(qkv, backend), len(qkv)) <= limit
    else:
        assert added_by_attention(qkv, backend, option) <= limit


@pytest.mark.gpu
def test_eager_has_all_scores_on_a_gpu() -> None:
    qkv = random_qkv(8192, 12, 64, "fp16")
    assert added_by_eager(qkv) > scores_bytes(qkv)
