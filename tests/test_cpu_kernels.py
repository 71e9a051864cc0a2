"""The CPU's attention kernel, on each instruction set that this processor has."""

from __future__ import annotations

import threading

import pytest
import torch
from berts import DTYPES
from cpu_isas import MARKS, attend_and_check, isa, poisoned, pytorch_is_not_asked, threads
from test_ops import check, cumulative, distance_attention

from encoder_fast.ops.add_layer_norm import add_layer_norm
from encoder_fast.ops.attention import attention

pytestmark = MARKS

__all__ = ["isa", "poisoned", "pytorch_is_not_asked", "threads"]  # fixtures


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
    eager, exact = (distance_attention(qkv.to(t), None, None) for t in (qkv.dtype, torch.float64))
    assert torch.equal(output.isnan(), eager.isnan())
    numbers = ~eager.isnan().flatten(1).any(1)
    assert numbers.all() == (value < 0)
    if numbers.any():
        check(output[numbers], eager[numbers], exact[numbers])


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


@pytest.mark.parametrize("bias", [None, torch.randn(2, 7)], ids=["plain", "bias"])
@pytest.mark.parametrize("counts", [[], [0, 0]])
@pytest.mark.parametrize("total", [0, 5])
def test_no_sequence(total: int, counts: list[int], bias: torch.Tensor | None) -> None:
    q = torch.randn(total, 2, 16)
    output = attention(q, q, q, cumulative(counts), 0, relative_bias=bias, backend="cpu")
    assert torch.equal(output, torch.zeros(total, 2, 16))
