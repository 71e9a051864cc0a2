"""The options of the Triton attention kernels, window and relative bias, by the same oracle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_oracle import (
    DEVICE,
    DTYPES,
    HEAD_DIMS,
    assert_as_good_as_eager,
    cumulated,
    name_of,
    poisoned_empty,
    random_qkv,
)
from torch import Tensor

from encoder_fast.backends.triton import attention
from encoder_fast.kernels import local_attention

# Empty sequences at the front, inside and at the end, and lengths on and beside the tiles' edges.
MIXED = (0, 1, 63, 64, 0, 65, 129, 0)


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    with poisoned_empty():
        yield


def random_bias(heads: int, reach: int, dtype: torch.dtype) -> Tensor:
    """(H, 2 R + 1), a view into NaN; of the size of the scores, so that each value counts."""
    buffer = torch.full((heads, 2 * reach + 9), float("nan"), dtype=dtype, device=DEVICE)
    buffer[:, 4:-4] = torch.randn(heads, 2 * reach + 1)
    return buffer[:, 4:-4]


# A window of 0 sees the query alone. The others lie around where the first row of a tile, or its
# last, sees a tile of keys whole or not at all: at one below a multiple of the tile and beside it.
# 62 and 126 are where one key too many would pass for whole.
@pytest.mark.parametrize("window", (0, 1, 62, 63, 64, 65, 126, 127), ids=lambda w: f"W{w}")
def test_window(window: int) -> None:
    lengths = (*MIXED, 200)
    q, k, v = random_qkv(sum(lengths), 5, 1, 16, torch.float16).unbind(1)
    assert_as_good_as_eager(q, k, v, lengths, window_size=window)


@pytest.mark.parametrize("window", (14, 15, 16, 17, 30), ids=lambda w: f"W{w}")
def test_window_beside_tiles_of_16_keys(window: int) -> None:
    lengths = (0, 15, 16, 17, 33, 60)
    q, k, v = random_qkv(sum(lengths), 5, 1, 16, torch.float32).unbind(1)
    assert_as_good_as_eager(q, k, v, lengths, window_size=window)


@pytest.mark.parametrize("window", (30, 31, 32, 33, 62), ids=lambda w: f"W{w}")
def test_window_beside_tiles_of_32_keys(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_attention, "shared_memory", lambda device: 99 * 1024)
    lengths = (0, 31, 32, 33, 110)
    q, k, v = random_qkv(sum(lengths), 5, 1, 16, torch.float16).unbind(1)
    assert_as_good_as_eager(q, k, v, lengths, window_size=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"D{head_dim}")
def test_window_for_every_head_size_and_dtype(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(sum(MIXED), 5, 1, head_dim, dtype).unbind(1)
    assert_as_good_as_eager(q, k, v, MIXED, window_size=33)


# In float32 the tiles of narrow heads depend on no card.
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    ((torch.float16, 16), (torch.float16, 128), (torch.float32, 128)),
    ids=("float16-D16", "float16-D128", "float32-D128"),
)
def test_window_on_cards_with_less_shared_memory(
    dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_attention, "shared_memory", lambda device: 99 * 1024)
    q, k, v = random_qkv(sum(MIXED), 5, 1, head_dim, dtype).unbind(1)
    assert_as_good_as_eager(q, k, v, MIXED, window_size=40)


@pytest.mark.parametrize("window", (64, 300))
def test_window_in_a_long_sequence(window: int) -> None:
    # 300 leaves whole tiles on both sides of a query's own, 64 none.
    q, k, v = random_qkv(1003, 0, 1, 16, torch.float16).unbind(1)
    assert_as_good_as_eager(q, k, v, (1000, 3), window_size=window)


@pytest.mark.skipif(DEVICE == "cuda", reason="would take 9 GB there, where pages are not lazy")
def test_window_beyond_32_bits_of_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    # From tile to tile it is 2**31 elements.
    config = local_attention.LocalAttentionConfig(16, 16, 4, 2)
    monkeypatch.setattr(local_attention, "choose_config", lambda *_: config)
    try:
        storage = torch.empty_strided((2**32 + 48,), (1,), dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"8 GiB cannot be had: {error}")
    q, k, v = (storage[16 * i :].as_strided((33, 1, 16), (2**27, 16, 1)) for i in range(3))
    for x in (q, k, v):
        x.copy_(torch.randn(33, 1, 16))
    for window in (3, 31):
        assert_as_good_as_eager(q, k, v, (33,), window_size=window)


@pytest.mark.parametrize("lengths", ((), (0, 0), (0,)), ids=("B0", "B2", "B1"))
def test_nothing_to_attend_to(lengths: tuple[int, ...]) -> None:
    q, k, v = random_qkv(0, 70, 2, 16, torch.float16).unbind(1)
    out = local_attention.local_attention(q, k, v, cumulated(lengths), 100, 0.2, 3)
    assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.parametrize("length", (1, 2, 64, 65, 100))
def test_a_window_as_wide_as_the_sequence_is_none(length: int) -> None:
    # The kernel itself, which no call with such a window reaches by itself.
    q, k, v = random_qkv(length, 0, 1, 16, torch.float16).unbind(1)
    cu_seqlens = cumulated((length,))
    expected = attention(q, k, v, cu_seqlens, length, 0.25)
    for window in (length - 1, length, 2**31):
        out = local_attention.local_attention(q, k, v, cu_seqlens, length, 0.25, window)
        torch.testing.assert_close(out, expected, rtol=0, atol=torch.finfo(torch.float16).eps)


def test_window_looks_at_no_key_outside() -> None:
    # NaN in all keys and values that the tiles of the first sequence's end do not touch.
    q, k, v = random_qkv(400, 0, 1, 16, torch.float16).unbind(1)
    k, v = k.clone(), v.clone()
    before = attention(q, k, v, cumulated((400,)), 400, 0.25, window_size=20)
    k[:256], v[:256] = float("nan"), float("inf")
    after = attention(q, k, v, cumulated((400,)), 400, 0.25, window_size=20)
    assert torch.equal(after[320:], before[320:])
    assert not after[:256].isfinite().any()


@pytest.mark.parametrize("tail", (1, 700))
def test_tokens_of_no_sequence_are_zero(tail: int) -> None:
    # 700 rows are more than one pass of the programs that there are for these lengths.
    q, k, v = random_qkv(203, tail, 2, 16, torch.float16).unbind(1)
    assert_as_good_as_eager(q, k, v, (200, 3), window_size=10)


# One entry a launch configuration.
BIASED = {
    "packed": (0, 1, 15, 16, 7, 0, 0, 16, 2, 0),
    "one-64": (63, 64, 0, 1, 33),
    "one-128": (127, 65, 0, 1),
    "loop-64": (129, 0, 1, 63, 65, 0),
    "loop-128": (257, 129),
}


# R smaller and larger than any sequence, and one that ends within a tile.
@pytest.mark.parametrize("reach", (0, 1, 40, 300), ids=lambda reach: f"R{reach}")
@pytest.mark.parametrize("lengths", BIASED.values(), ids=BIASED)
def test_relative_bias(lengths: tuple[int, ...], reach: int) -> None:
    q, k, v = random_qkv(sum(lengths), 5, 2, 16, torch.float16).unbind(1)
    bias = random_bias(2, reach, torch.float16)
    assert_as_good_as_eager(q, k, v, lengths, relative_bias=bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"D{head_dim}")
def test_relative_bias_for_every_head_size_and_dtype(head_dim: int, dtype: torch.dtype) -> None:
    bias = random_bias(1, 50, dtype)
    for lengths in (BIASED["packed"], BIASED["loop-64"]):
        q, k, v = random_qkv(sum(lengths), 0, 1, head_dim, dtype).unbind(1)
        assert_as_good_as_eager(q, k, v, lengths, relative_bias=bias)


def test_relative_bias_in_float32_beside_half_precision() -> None:
    q, k, v = random_qkv(100, 0, 2, 16, torch.float16).unbind(1)
    assert_as_good_as_eager(q, k, v, (70, 30), relative_bias=random_bias(2, 20, torch.float32))


def test_relative_bias_is_added_after_the_scale() -> None:
    q, k, v = random_qkv(100, 0, 2, 16, torch.float32).unbind(1)
    bias = random_bias(2, 20, torch.float32)
    assert_as_good_as_eager(q, k, v, (70, 30), scale=0.03, relative_bias=bias)


def test_large_bias() -> None:
    # Some weights of 1, most 0: a maximum that forgot the bias would overflow.
    for lengths in ((7, 16), (64, 3), (150, 65)):
        q, k, v = random_qkv(sum(lengths), 0, 4, 16, torch.float16).unbind(1)
        bias = random_bias(4, 200, torch.float16) * 300
        assert_as_good_as_eager(q, k, v, lengths, relative_bias=bias)


def random_layout(layout: str, total: int) -> list[Tensor]:
    heads, head_dim, dtype = 3, 16, torch.float16
    tensors = list(random_qkv(total, 0, heads, head_dim, dtype).unbind(1))
    if layout == "head-major":
        return [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    if layout == "odd-rows":
        # No row starts at a multiple of 16 bytes, and the strides of q, k and v all differ.
        nan = float("nan")
        rows = [torch.full((total, 48 + pad), nan, device=DEVICE).to(dtype) for pad in (1, 3, 5)]
        for row, x in zip(rows, tensors, strict=True):
            row[:, 1:49] = x.reshape(total, -1)
        return [row[:, 1:49].unflatten(1, (heads, head_dim)) for row in rows]
    return tensors


@pytest.mark.parametrize("layout", ("packed", "head-major", "odd-rows"))
def test_strides(layout: str) -> None:
    for lengths in ((16, 3, 0, 16), (70, 1, 66)):
        q, k, v = random_layout(layout, sum(lengths))
        assert_as_good_as_eager(q, k, v, lengths, window_size=13)
        bias = random_bias(3, 30, torch.float16)
        assert_as_good_as_eager(q, k, v, lengths, relative_bias=bias)
        # One row of biases for all heads.
        assert_as_good_as_eager(q, k, v, lengths, relative_bias=bias[:1].expand(3, -1))


@pytest.mark.parametrize("intruder", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("lengths", ((7, 16, 9), (150, 70, 65)), ids=("packed", "loop"))
def test_sequences_do_not_see_each_other(lengths: tuple[int, ...], intruder: float) -> None:
    packed = random_qkv(sum(lengths), 0, 1, 16, torch.float16)
    cu_seqlens, longest = cumulated(lengths), max(lengths)
    begin, end = cu_seqlens.tolist()[1:3]
    after = packed.clone()
    after[begin:end] = intruder
    outside = torch.ones(len(packed), dtype=torch.bool, device=DEVICE)
    outside[begin:end] = False
    for options in ({"window_size": 5}, {"relative_bias": random_bias(1, 9, torch.float16)}):
        one, other = (
            attention(*x.unbind(1), cu_seqlens, longest, 0.2, **options) for x in (packed, after)
        )
        assert torch.equal(one[outside], other[outside])


@pytest.mark.skipif(DEVICE == "cpu", reason="takes minutes in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"D{head_dim}")
def test_longest_sequence_among_short_ones(head_dim: int, dtype: torch.dtype) -> None:
    lengths = (3, 8192, 0, 700, 8191)
    q, k, v = random_qkv(sum(lengths), 100, 4, head_dim, dtype).unbind(1)
    for window in (64, 1000):
        assert_as_good_as_eager(q, k, v, lengths, window_size=window)
    assert_as_good_as_eager(q, k, v, lengths, relative_bias=random_bias(4, 128, dtype))


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no device to wait for")
def test_never_waits_for_the_device() -> None:
    q, k, v = random_qkv(200, 5, 2, 64, torch.float16).unbind(1)
    cu_seqlens, bias = cumulated((130, 70)), random_bias(2, 9, torch.float16)
    for options in ({"window_size": 20}, {"relative_bias": bias}):
        attention(q, k, v, cu_seqlens, 130, 0.1, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            attention(q, k, v, cu_seqlens, 130, 0.1, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
