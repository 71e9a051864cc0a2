"""The CPU's own kernels, on each instruction set that this processor has."""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from berts import DEVICE, DTYPES, inputs, tiny
from layer_norm_oracle import layer_norm_float64
from test_ops import check, cumulative, distance_attention
from test_packaging import python, succeed

import encoder_fast
from encoder_fast.backends import cpu_attention, cpu_kernels
from encoder_fast.ops.add_layer_norm import add_layer_norm, add_layer_norm_sum
from encoder_fast.ops.add_layer_norm import operator as add_layer_norm_operator
from encoder_fast.ops.attention import attention
from encoder_fast.ops.attention import operator as attention_operator

INSTRUCTIONS = ("AVX2", "AVX-512", "AVX-512 with bfloat16")
HERE = cpu_kernels.isa

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="kernels of the CPU"),
    pytest.mark.skipif(HERE == 0, reason=cpu_kernels.why_not() or "no kernels"),
]


@pytest.fixture(params=INSTRUCTIONS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    number = INSTRUCTIONS.index(request.param) + 1
    if number > HERE:
        pytest.skip(f"this processor has {cpu_kernels.instructions()} at most")
    monkeypatch.setattr(cpu_kernels, "isa", number)
    return number


@pytest.fixture
def threads() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.fixture(autouse=True)
def pytorch_is_not_asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the kernels fails where PyTorch computes in their place; by `seen` it may."""
    if "seen" in request.fixturenames:
        return

    def refuse(*_: object) -> None:
        raise AssertionError("the kernel was passed by")

    # what attention by PyTorch calls whatever the dtype and the lengths
    monkeypatch.setattr(cpu_attention, "_most_scores", refuse)
    monkeypatch.setattr(F, "layer_norm", refuse)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory, of results and workspaces, is NaN: what is left out or read too soon shows."""
    new_empty = torch.Tensor.new_empty

    def new_nan(x: torch.Tensor, *size: object, **options: object) -> torch.Tensor:
        return new_empty(x, *size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)


def attend_and_check(
    qkv: torch.Tensor,
    counts: list[int],
    window: int | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each sequence by the parity rule; the scale is 0.25, as the oracle's."""
    output = attention(
        *qkv.unbind(1),
        cumulative(counts),
        max(counts, default=0),
        softmax_scale=0.25,
        window_size=window,
        relative_bias=bias,
        backend="cpu",
    )
    for rows in torch.arange(sum(counts)).split(counts):
        if len(rows):
            eager, exact = (
                distance_attention(qkv[rows].to(dtype), window, bias)
                for dtype in (qkv.dtype, torch.float64)
            )
            check(output[rows], eager, exact)
    return output


# Beside 6 rows, 8 and 16 lanes, a panel of 16 and 64 keys, and a block of 256.
COUNTS = {
    "short": [1, 5, 6, 7, 0, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65],
    "blocks": [255, 256, 257, 513],
}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 32, 48, 64, 80, 96, 112, 128, 192])
@pytest.mark.usefixtures("isa")
def test_attention(size: int, dtype: str, counts: str) -> None:
    lengths = COUNTS[counts]
    qkv = torch.randn(sum(lengths) + 3, 3, 2, size).to(DTYPES[dtype])
    output = attend_and_check(qkv, lengths)
    assert (output[sum(lengths) :] == 0).all()


@pytest.mark.parametrize("option", ["plain", "window-0", "window-1", "window-300", "bias-700"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_attention_over_many_blocks(dtype: str, option: str) -> None:
    # Blocks of keys, and chunks of queries: a softmax goes on from one to the next.
    kind, _, number = option.partition("-")
    qkv = torch.randn(2600, 3, 1, 32).to(DTYPES[dtype])
    window = int(number) if kind == "window" else None
    bias = torch.randn(1, 2 * int(number) + 1) if kind == "bias" else None
    attend_and_check(qkv, [2500, 100], window, bias)


@pytest.mark.parametrize("option", ["window-10", "window-70", "bias-3", "bias-90"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_attention_by_distance(dtype: str, option: str) -> None:
    kind, _, number = option.partition("-")
    counts = COUNTS["short"]
    qkv = torch.randn(sum(counts), 3, 3, 32).to(DTYPES[dtype])
    if kind == "window":
        attend_and_check(qkv, counts, int(number))
    else:
        attend_and_check(qkv, counts, None, torch.randn(3, 2 * int(number) + 1).to(DTYPES[dtype]))


# Biases that end within a sequence, and behind all of them.
@pytest.mark.parametrize("option", ["plain", "window-10", "bias-3", "bias-900"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa", "poisoned")
def test_nothing_is_read_or_left_out_beside_a_sequence(dtype: str, option: str) -> None:
    kind, _, number = option.partition("-")
    counts = [511, 0, 512, 1, 513]
    used = sum(counts)
    around = torch.full((64 + used + 64, 3, 2, 48), float("nan"), dtype=DTYPES[dtype])
    qkv = around[64:]
    qkv[:used] = torch.randn(used, 3, 2, 48)
    window = int(number) if kind == "window" else None
    bias = torch.randn(2, 2 * int(number) + 1) if kind == "bias" else None
    output = attend_and_check(qkv, counts, window, bias)
    assert (output[used:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_strides(dtype: str) -> None:
    # (total, H, 3, D), a slice of wider rows, and keys that all heads share
    wide = torch.randn(40, 4, 3, 48).to(DTYPES[dtype])
    q, k, v = wide[:, 1:3, :, 8:40].unbind(2)
    k = k[:, :1].expand(-1, 2, -1)
    output = attention(q, k, v, cumulative([33, 7]), 33, softmax_scale=0.25, backend="cpu")
    same = torch.stack([q, k, v], dim=1).contiguous()
    expected = attention(
        *same.unbind(1), cumulative([33, 7]), 33, softmax_scale=0.25, backend="cpu"
    )
    assert torch.equal(output, expected)
    attend_and_check(same, [33, 7])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_a_nan_stays_in_its_sequence_and_shows_there(dtype: str) -> None:
    qkv = torch.randn(150, 3, 2, 32).to(DTYPES[dtype])
    qkv[70, 1, 0, 3] = float("nan")
    output = attention(*qkv.unbind(1), cumulative([50, 50, 50]), 50, backend="cpu")
    assert output[50:100, 0].isnan().all()
    assert output[:50].isfinite().all() and output[100:].isfinite().all()
    assert output[50:100, 1].isfinite().all()


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_a_nan_goes_where_eager_takes_it(dtype: str, part: str) -> None:
    # In the second of three blocks of keys, and between two other sequences.
    counts = [5, 600, 5]
    qkv = torch.randn(sum(counts), 3, 2, 32).to(DTYPES[dtype])
    qkv[5 + 300, "qkv".index(part), 1, 3] = float("nan")
    output = attention(*qkv.unbind(1), cumulative(counts), 600, softmax_scale=0.25, backend="cpu")
    eager = torch.cat([distance_attention(one, None, None) for one in qkv.split(counts)])
    assert eager.isnan().any()
    assert torch.equal(output.isnan(), eager.isnan())


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
@pytest.mark.usefixtures("isa")
def test_an_infinite_score_as_in_eager(value: float) -> None:
    qkv = torch.rand(600, 3, 1, 16) + 0.1
    qkv[550, 1] = value
    output = attention(*qkv.unbind(1), cumulative([600]), 600, softmax_scale=0.25, backend="cpu")
    eager = distance_attention(qkv, None, None)
    assert torch.equal(output.isnan(), eager.isnan())
    assert torch.allclose(output, eager, equal_nan=True, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.usefixtures("isa")
def test_large_scores(dtype: str) -> None:
    # One key has all the weight, the rest underflow.
    qkv = 200 * torch.randn(700, 3, 1, 32).to(DTYPES[dtype])
    output = attention(*qkv.unbind(1), cumulative([700]), 700, backend="cpu")
    scores = qkv[:, 0, 0].double() @ qkv[:, 1, 0].double().T
    top = scores.topk(2, dim=-1)
    clear = top.values[:, 0] - top.values[:, 1] > 1e4
    assert clear.sum() > 300
    assert torch.equal(output[clear, 0], qkv[top.indices[clear, 0], 2, 0])


# Scores about -1e4 or 1e4; of the two in turn, a block of keys is worth nothing beside the other.
SIGNS = {"low": (-1, -1), "high": (1, 1), "rising": (-1, 1), "falling": (1, -1)}


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa", "poisoned")
def test_scores_far_from_0(dtype: str, signs: str) -> None:
    qkv = torch.randn(700, 3, 1, 16)
    first, then = SIGNS[signs]
    qkv[:, 0, 0, 0] = 100
    qkv[:300, 1, 0, 0] = 400 * first
    qkv[300:, 1, 0, 0] = 400 * then
    attend_and_check(qkv.to(DTYPES[dtype]), [700])


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("counts", [[1], [700], [3] * 5, [1200, 2, 900]])
@pytest.mark.usefixtures("isa", "threads")
def test_the_number_of_threads_changes_no_bit(counts: list[int], window: int | None) -> None:
    qkv = torch.randn(sum(counts), 3, 3, 32)
    outputs = []
    for number in (1, 2, 3, 7, 16):
        torch.set_num_threads(number)
        attended = attention(
            *qkv.unbind(1), cumulative(counts), max(counts), window_size=window, backend="cpu"
        )
        outputs.append((attended, add_layer_norm(qkv.flatten(1), backend="cpu")))
    # However a sequence is cut, the same queries go together and see the same blocks of keys.
    for attended, normed in outputs[1:]:
        assert torch.equal(normed, outputs[0][1]) and torch.equal(attended, outputs[0][0])


@pytest.mark.usefixtures("threads")
def test_two_callers_at_once() -> None:
    torch.set_num_threads(2)
    batches = [torch.randn(300, 3, 4, 32) for _ in range(2)]
    cu_seqlens = cumulative([100, 200])
    expected = [attention(*x.unbind(1), cu_seqlens, 200, backend="cpu") for x in batches]
    wrong = []

    def call(batch: torch.Tensor, right: torch.Tensor) -> None:
        for _ in range(50):
            if not torch.equal(attention(*batch.unbind(1), cu_seqlens, 200, backend="cpu"), right):
                wrong.append(batch)

    callers = [
        threading.Thread(target=call, args=pair) for pair in zip(batches, expected, strict=True)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize(
    ("cu_seqlens", "max_seqlen"),
    [([1, 9], 9), ([0, 6, 5, 9], 9), ([0, 10], 10), ([0, 9], 8), ([0, -1], 9)],
)
def test_lengths_that_make_no_sense(cu_seqlens: list[int], max_seqlen: int) -> None:
    q = torch.randn(9, 1, 16)
    bounds = torch.tensor(cu_seqlens, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens must begin with 0, never fall, end with 9"):
        attention(q, q, q, bounds, max_seqlen, backend="cpu")


@pytest.mark.parametrize("bias", [None, torch.randn(2, 7)], ids=["plain", "bias"])
@pytest.mark.parametrize("counts", [[], [0, 0]])
@pytest.mark.parametrize("total", [0, 5])
def test_no_sequence(total: int, counts: list[int], bias: torch.Tensor | None) -> None:
    q = torch.randn(total, 2, 16)
    output = attention(q, q, q, cumulative(counts), 0, relative_bias=bias, backend="cpu")
    assert torch.equal(output, torch.zeros(total, 2, 16))


REST = (None, None, None, 1e-5, None, "cpu")  # add_layer_norm's arguments behind x


@pytest.mark.parametrize("default", [torch.float16, torch.float64], ids=["fp16", "fp64"])
def test_other_defaults_of_device_and_dtype(default: torch.dtype) -> None:
    qkv = torch.randn(40, 3, 2, 32)
    bias, cu_seqlens = torch.randn(2, 21), cumulative([33, 7])

    # As the engine does: the dispatcher, past which this goes, would put the default device aside.
    def call() -> torch.Tensor:
        return attention_operator.run(*qkv.unbind(1), cu_seqlens, 33, 0.25, None, bias, "cpu")

    expected = call()
    try:
        torch.set_default_dtype(default)
        with torch.device("meta"):
            output = call()
            normed = add_layer_norm_operator.run(qkv.flatten(1), *REST)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output, expected) and normed.device.type == "cpu"


def test_a_tensor_without_memory_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.undo()
    q, bounds = torch.randn(9, 2, 16), cumulative([9])
    rows, weight = q.flatten(1), torch.ones(32)
    with FakeTensorMode() as mode:
        fake = add_layer_norm_operator.run(mode.from_tensor(rows), *REST)
    assert fake.shape == (9, 32)

    class Named(torch.Tensor):
        pass

    for x, w in ((rows.as_subclass(Named), weight), (rows, weight.as_subclass(Named))):
        assert not cpu_kernels.normalises(x, None, w, None, None)
    assert cpu_kernels.normalises(rows, None, torch.nn.Parameter(weight), None, None)
    assert cpu_kernels.attends(q, q, q, bounds, None)
    assert not cpu_kernels.attends(q, q, q.as_subclass(Named), bounds, None)
    traced = torch.jit.trace(lambda x: add_layer_norm_operator.run(x, *REST), rows)
    other = torch.randn(9, 32)
    torch.testing.assert_close(traced(other), F.layer_norm(other, (32,)))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What PyTorch was asked for."""
    calls: list[str] = []
    for place, name in ((cpu_attention, "_most_scores"), (F, "layer_norm")):
        monkeypatch.setattr(place, name, _spied(getattr(place, name), name, calls))
    return calls


def _spied(original: Callable[..., object], name: str, calls: list[str]) -> Callable[..., object]:
    def spy(*args: object) -> object:
        calls.append(name)
        return original(*args)

    return spy


@pytest.mark.parametrize("why", ["no kernels", "head size", "wide heads", "AMX"])
def test_what_is_left_to_pytorch(
    why: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size, dtype = {"head size": 24, "wide heads": 208}.get(why, 16), torch.float32
    if why == "no kernels":
        monkeypatch.setattr(cpu_kernels, "isa", 0)
    elif why == "AMX":
        dtype = torch.bfloat16
        monkeypatch.setattr(cpu_kernels, "_LEFT_TO_PYTORCH", (torch.bfloat16,))
        monkeypatch.setattr(cpu_attention, "has_onednn", lambda dtype: True)
    attend_and_check(torch.randn(170, 3, 2, size).to(dtype), [100, 70])
    assert seen == ["_most_scores"]


# A window of fewer keys than a block of its queries, and of more than a sequence has.
@pytest.mark.parametrize("option", ["plain", "window-20", "window-200", "bias-10", "bias-300"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.usefixtures("seen")
def test_attention_by_pytorch(
    size: int, dtype: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "attention", None)  # a call of it is an error
    if size % 16 == 0:
        monkeypatch.setattr(cpu_kernels, "isa", 0)
    kind, _, number = option.partition("-")
    counts = [15, 0, 1, 63, 64, 65, 257]
    qkv = torch.randn(sum(counts) + 3, 3, 2, size).to(DTYPES[dtype])
    window = int(number) if kind == "window" else None
    bias = torch.randn(2, 2 * int(number) + 1) if kind == "bias" else None
    output = attend_and_check(qkv, counts, window, bias)
    assert (output[sum(counts) :] == 0).all()


def test_float64_is_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "attention", None)
    qkv, bounds = torch.randn(40, 3, 2, 32, dtype=torch.float64), cumulative([40])
    assert not cpu_kernels.attends(*qkv.unbind(1), bounds, None)
    assert not cpu_kernels.normalises(qkv.flatten(1), None)
    output = attention(*qkv.unbind(1), bounds, 40, softmax_scale=0.25, backend="reference")
    exact = distance_attention(qkv, None, None)
    assert output.dtype == torch.float64
    check(output, exact, exact)


def test_norms_that_are_left_to_pytorch(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(5, 64)
    add_layer_norm(rows, backend="cpu")
    assert not seen
    add_layer_norm(torch.randn(5, 24), backend="cpu")
    add_layer_norm(rows[:, :32], rows[:, :32], backend="cpu")  # not contiguous
    add_layer_norm(rows.half(), None, torch.ones(64, dtype=torch.float16), backend="cpu")
    assert seen == ["layer_norm"] * 2
    monkeypatch.setattr(cpu_kernels, "isa", 0)
    add_layer_norm(rows, backend="cpu")
    assert seen == ["layer_norm"] * 3


@pytest.mark.parametrize("terms", ["x", "x+residual", "x+bias+residual"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48, 384, 768, 1024, 8192])
@pytest.mark.usefixtures("isa")
def test_add_layer_norm(width: int, dtype: str, affine: bool, terms: str) -> None:
    kind = DTYPES[dtype]
    # a mean far from 0, for the variance
    x, residual = (3 + torch.randn(2, 37, width)).to(kind)
    x_bias, weight, bias = torch.randn(3, width).to(kind)
    added = [x_bias if "bias" in terms else None, residual if "residual" in terms else None]
    vectors = [weight, bias] if affine else [None, None]

    def exact(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        total = x.to(dtype)
        for term in added:
            total = total if term is None else total + term.to(dtype)
        centred = total - total.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return (y * weight.to(dtype) + bias.to(dtype) if affine else y), total

    eager, wide = exact(kind), exact(torch.float64)
    output = add_layer_norm(x, added[1], *vectors, 1e-5, x_bias=added[0], backend="cpu")
    check(output, eager[0], wide[0])
    if added[1] is not None:
        both = add_layer_norm_sum(x, added[1], *vectors, 1e-5, x_bias=added[0], backend="cpu")
        assert torch.equal(both[0], output)
        check(both[1], eager[1], wide[1])


@pytest.mark.usefixtures("isa")
def test_rows_of_equal_elements() -> None:
    # eps is as BERT's: what is left of the mean would come out a thousand times as large
    rows = torch.randn(100, 1).expand(100, 768).contiguous()
    output = add_layer_norm(rows, eps=1e-12, backend="cpu")
    assert torch.equal(output, torch.zeros_like(rows))
    assert add_layer_norm(rows, eps=0.0, backend="cpu").isnan().all()


def test_operands_that_do_not_fit_are_left_to_pytorch() -> None:
    q, bounds = torch.randn(9, 2, 16), cumulative([9])
    assert cpu_kernels.attends(q, q, q, bounds, torch.randn(2, 3))
    assert not cpu_kernels.attends(q, q[:3], q, bounds, None)
    assert not cpu_kernels.attends(q, q, q.half(), bounds, None)
    assert not cpu_kernels.attends(q, q, q, bounds.long(), None)
    assert not cpu_kernels.attends(q, q, q, torch.zeros(4, dtype=torch.int32)[::2], None)
    assert not cpu_kernels.attends(q, q, q, bounds, torch.randn(1, 3))
    rows = torch.randn(4, 32)
    assert not cpu_kernels.normalises(rows, rows[:1], None)
    assert not cpu_kernels.normalises(rows, None, rows[0, :16])
    zeros = torch._efficientzerotensor((4, 32))
    assert not cpu_kernels.normalises(zeros, None, None)
    assert not cpu_kernels.normalises(rows, torch._neg_view(rows), None)


def norm_and_check(
    x: torch.Tensor, vectors: dict[str, torch.Tensor], residual: torch.Tensor | None = None
) -> None:
    x_bias, weight, bias = (vectors.get(name) for name in ("x_bias", "weight", "bias"))
    terms = [term for term in (x, x_bias, residual) if term is not None]
    total = sum(terms[1:], terms[0])
    eager = torch.layer_norm(total, x.shape[1:], weight, bias, 1e-5)
    # the oracle stacks its terms, and a vector is one for every row
    exact = layer_norm_float64([t.expand_as(x) for t in terms], weight, bias, 1e-5)
    output = add_layer_norm(x, residual, weight, bias, 1e-5, x_bias=x_bias, backend="cpu")
    check(output, eager, exact)
    if residual is not None:
        both = add_layer_norm_sum(x, residual, weight, bias, 1e-5, x_bias=x_bias, backend="cpu")
        assert torch.equal(both[0], output)
        check(both[1], total, sum(t.double() for t in terms))


VECTORS = ("x_bias", "weight", "bias")


@pytest.mark.parametrize("names", ["x_bias", "weight", "bias", "x_bias+weight"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa", "poisoned")
def test_a_norm_with_some_of_its_vectors(dtype: str, names: str) -> None:
    # 1366 rows of 48 are as many as one share takes, and one row more.
    x = torch.randn(1366, 48).to(DTYPES[dtype])
    norm_and_check(x, {name: torch.randn(48).to(x.dtype) for name in names.split("+")})


@pytest.mark.parametrize("width", [24, 48])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("seen")
def test_a_norm_by_pytorch(dtype: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "add_layer_norm", None)  # a call of it is an error
    if width % 16 == 0:
        monkeypatch.setattr(cpu_kernels, "isa", 0)
    x, residual = torch.randn(2, 37, width).to(DTYPES[dtype])
    vectors = dict(zip(VECTORS, torch.randn(3, width).to(x.dtype), strict=True))
    for names in ((), VECTORS):
        some = {name: vectors[name] for name in names}
        norm_and_check(x, some)
        norm_and_check(x, some, residual)


def test_no_rows() -> None:
    assert add_layer_norm(torch.empty(0, 32), backend="cpu").shape == (0, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_a_whole_model(dtype: str, seen: list[str]) -> None:
    model = tiny().to(DTYPES[dtype])
    encoder_fast.patch(model, strict=True)
    with torch.inference_mode():
        model(**inputs("right"))
    assert not seen
    result = encoder_fast.check_parity(model, inputs("right"))
    assert result.ok, result


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_model_by_pytorch(
    dtype: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "isa", 0)
    model = tiny().to(DTYPES[dtype])
    encoder_fast.patch(model, strict=True)
    with torch.inference_mode():
        model(**inputs("right"))
    assert {"_most_scores", "layer_norm"} <= set(seen)
    result = encoder_fast.check_parity(model, inputs("right"))
    assert result.ok, result


def test_the_names_of_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("none", *INSTRUCTIONS)):
        monkeypatch.setattr(cpu_kernels, "isa", number)
        assert cpu_kernels.instructions() == name


def test_a_processor_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules,
        "encoder_fast._cpu",
        SimpleNamespace(best_isa=lambda: 0, INTERFACE=cpu_kernels._INTERFACE),
    )
    assert cpu_kernels._load() == (None, "this processor lacks AVX2, FMA or F16C")


def test_what_info_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"kernels for {cpu_kernels.instructions()}" in encoder_fast.info().cpu
    monkeypatch.setattr(cpu_kernels, "_reason", "nobody built them")
    assert "no kernels of its own: nobody built them" in encoder_fast.info().cpu


# Runs a model where the extension is missing, or is no extension at all.
WITHOUT = """
import sys
import encoder_fast
{hide}
from berts import inputs, tiny
from encoder_fast.backends import cpu_kernels
model = encoder_fast.patch(tiny(), strict=True)
assert encoder_fast.check_parity(model, inputs("right")).ok
assert cpu_kernels.isa == 0
print(cpu_kernels.why_not())
"""


@pytest.mark.parametrize(
    ("hide", "reason"),
    [
        ("sys.modules['encoder_fast._cpu'] = None", "_cpu is not built; that takes a C++ compiler"),
        ("encoder_fast.__path__.insert(0, {folder!r})", "_cpu does not load: "),
        ("sys.modules['encoder_fast._cpu'] = sys", "_cpu was built from other sources"),
    ],
    ids=["missing", "broken", "other sources"],
)
def test_a_model_runs_without_the_extension(hide: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not ELF")
    code = WITHOUT.format(hide=hide.format(folder=str(tmp_path)))
    paths = [path for path in sys.path if path.endswith("tests")]
    assert reason in succeed(python(f"import sys; sys.path += {paths!r}\n{code}", tmp_path))
