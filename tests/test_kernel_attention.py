"""The Triton attention kernel against a float64 softmax of every sequence by itself.

The same bodies run on the GPU where there is one, and through Triton's interpreter elsewhere. Every
input lies in a buffer that is NaN around it, and every output starts as NaN, so a row read or left
out by mistake shows.
"""

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

from encoder_fast.kernels import attention as kernel
from encoder_fast.kernels.attention_tiles import input_precision

# One entry a launch configuration, each with lengths on and to either side of its tile edges and
# with empty sequences at the front, inside and at the end.
LENGTHS = {
    "packed": (0, 1, 15, 16, 17, 0, 0, 32, 31, 32, 2, 0),
    "one-64": (63, 64, 0, 1, 33, 64),
    "one-128": (127, 65, 0, 128, 1, 16),
    "loop-64": (129, 0, 1, 63, 130, 192, 17, 0),
    "loop-128": (257, 0, 320, 129),
}


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    with poisoned_empty():
        yield


@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"D{head_dim}")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_configuration(lengths: tuple[int, ...], head_dim: int) -> None:
    # Three heads: not a power of two. How many there are and how wide they are meet nowhere, and
    # the interpreter takes them in turn. Five rows of tail: less than a tile.
    heads = 3 if head_dim == 32 else 1
    q, k, v = random_qkv(sum(lengths), 5, heads, head_dim, torch.float16).unbind(1)
    assert_as_good_as_eager(q, k, v, lengths)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"D{head_dim}")
def test_every_dtype(head_dim: int, dtype: torch.dtype) -> None:
    # bfloat16 sees the packed and the looping tiles; float32 has one configuration for a head size.
    for lengths in (LENGTHS["packed"], LENGTHS["loop-64"]):
        q, k, v = random_qkv(sum(lengths), 0, 1, head_dim, dtype).unbind(1)
        assert_as_good_as_eager(q, k, v, lengths)


@pytest.mark.parametrize("head_dim", (32, 128), ids=lambda head_dim: f"D{head_dim}")
def test_cards_with_less_shared_memory(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # They pack shorter sequences into smaller tiles, and have smaller ones for wide heads.
    monkeypatch.setattr(kernel, "shared_memory", lambda device: 99 * 1024)
    for lengths in ((0, 15, 16, 1, 0, 16, 16), (17, 3, 32), LENGTHS["loop-64"], (400, 65)):
        q, k, v = random_qkv(sum(lengths), 5, 1, head_dim, torch.float16).unbind(1)
        assert_as_good_as_eager(q, k, v, lengths)


# A tile of 16, 64 or 128 rows or keys has its edge at each of these.
@pytest.mark.parametrize("length", (1, 15, 16, 17, 63, 64, 65, 127, 129, 511, 512))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_one_sequence_of(length: int, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(length, 0, 1, 32, dtype).unbind(1)
    assert_as_good_as_eager(q, k, v, (length,))


@pytest.mark.parametrize(
    ("length", "dtype"), ((1025, torch.float32), (2049, torch.float16)), ids=name_of
)
def test_long_sequence(length: int, dtype: torch.dtype) -> None:
    # 33 key tiles: rounding errors of the running sum and maximum would add up.
    q, k, v = random_qkv(length, 0, 1, 32, dtype).unbind(1)
    assert_as_good_as_eager(q, k, v, (length,))


@pytest.mark.skipif(DEVICE == "cpu", reason="takes minutes in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"D{head_dim}")
def test_longest_sequence_among_short_ones(head_dim: int, dtype: torch.dtype) -> None:
    lengths = (3, 8192, 0, 700, 8191)
    q, k, v = random_qkv(sum(lengths), 100, 12, head_dim, dtype).unbind(1)
    assert_as_good_as_eager(q, k, v, lengths)


@pytest.mark.parametrize(
    "lengths",
    (
        (64, 64, 64),  # as many tiles to each: a plain grid without a search
        (200, 200),
        (300, *[2] * 40),  # one long among many short ones: tile slots
        (300, *[0] * 40, 150),  # most of them empty
        (1,) * 100,  # 64 sequences to a packed tile
    ),
    ids=("plain", "plain-loop", "slots", "slots-empty", "packed-ones"),
)
def test_every_way_to_cut_the_tokens(lengths: tuple[int, ...]) -> None:
    q, k, v = random_qkv(sum(lengths), 0, 2, 32, torch.float16).unbind(1)
    assert_as_good_as_eager(q, k, v, lengths)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=name_of)
@pytest.mark.parametrize("tail", (1, 64, 700))
@pytest.mark.parametrize("lengths", ((20, 0, 30), (60, 9), (200, 3)), ids=("32", "64", "longer"))
def test_tokens_of_no_sequence_are_zero(
    lengths: tuple[int, ...], tail: int, dtype: torch.dtype
) -> None:
    # 700 rows are more than one pass of the programs that there are for these lengths.
    q, k, v = random_qkv(sum(lengths), tail, 2, 16, dtype).unbind(1)
    assert_as_good_as_eager(q, k, v, lengths)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=name_of)
@pytest.mark.parametrize("tail", (0, 70))
@pytest.mark.parametrize("lengths", ((), (0,), (0, 0, 0)), ids=("B0", "B1", "B3"))
def test_nothing_to_attend_to(lengths: tuple[int, ...], tail: int, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(0, tail, 2, 64, dtype).unbind(1)
    assert_as_good_as_eager(q, k, v, lengths)


@pytest.mark.parametrize("longest", (512, 10_000), ids=lambda longest: f"max{longest}")
def test_max_seqlen_may_be_larger_than_any_sequence(longest: int) -> None:
    # As when a bucket of a CUDA graph stands in for the batch: empty tiles behind every sequence.
    lengths = (5, 0, 70)
    q, k, v = random_qkv(sum(lengths), 9, 2, 32, torch.float16).unbind(1)
    expected = kernel.attention(q, k, v, cumulated(lengths), 70, 0.2)
    out = kernel.attention(q, k, v, cumulated(lengths), longest, 0.2)
    torch.testing.assert_close(out, expected, rtol=0, atol=torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=name_of)
@pytest.mark.parametrize("layout", ("separate", "head-major", "odd-rows", "shared-keys"))
def test_strides(layout: str, dtype: torch.dtype) -> None:
    total, heads, head_dim = 150, 3, 32
    packed = random_qkv(total, 0, heads, head_dim, dtype)
    q, k, v = packed.unbind(1)
    if layout == "separate":
        q, k, v = q.clone(), k.clone(), v.clone()
    elif layout == "head-major":
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    elif layout == "odd-rows":
        # No row starts at a multiple of 16 bytes, and the strides of q, k and v all differ.
        rows = [torch.full((total, heads * head_dim + pad), float("nan")) for pad in (1, 3, 5)]
        rows = [x.to(device=DEVICE, dtype=dtype) for x in rows]
        for row, x in zip(rows, (q, k, v), strict=True):
            row[:, 1 : 1 + heads * head_dim] = x.reshape(total, -1)
        q, k, v = (x[:, 1 : 1 + heads * head_dim].unflatten(1, (heads, -1)) for x in rows)
    else:
        # One head of keys and values for all heads of queries: a stride of 0.
        k, v = (x[:, :1].expand(total, heads, head_dim) for x in (k, v))
    # 33 rows or fewer take packed tiles in half precision, 70 a tile each.
    for lengths in ((32, 3, 30, 0, 30, 28, 27), (70, 1, 66, 13)):
        assert_as_good_as_eager(q, k, v, lengths)


@pytest.mark.large_memory
def test_rows_beyond_32_bits_of_offset() -> None:
    # 33 rows, 2**26 elements apart: the last begins at 2**31. Pages not touched take no memory.
    try:
        storage = torch.empty_strided((2**31 + 48,), (1,), dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"4 GiB cannot be had: {error}")
    q, k, v = (storage[16 * i :].as_strided((33, 1, 16), (2**26, 16, 1)) for i in range(3))
    for x in (q, k, v):
        x.copy_(torch.randn(33, 1, 16))
    assert_as_good_as_eager(q, k, v, (33,))
    assert_as_good_as_eager(q, k, v, (1, 32))


@pytest.mark.skipif(DEVICE == "cuda", reason="would take 9 GB there, where pages are not lazy")
def test_tiles_beyond_32_bits_of_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    # From tile to tile, and to the last one, it is 2**31 elements and more.
    monkeypatch.setattr(kernel, "choose_config", lambda *_: kernel.AttentionConfig(16, 16, 4, 2))
    try:
        storage = torch.empty_strided((2**32 + 48,), (1,), dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"8 GiB cannot be had: {error}")
    q, k, v = (storage[16 * i :].as_strided((33, 1, 16), (2**27, 16, 1)) for i in range(3))
    for x in (q, k, v):
        x.copy_(torch.randn(33, 1, 16))
    assert_as_good_as_eager(q, k, v, (33,))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", ("large", "all-negative", "all-positive"))
def test_extreme_scores(kind: str, dtype: torch.dtype) -> None:
    for lengths in ((7, 30, 0, 25, 5), (64, 3, 40), (150, 65)):
        # Many rows for the scores where single ones decide, or the largest error would be luck.
        heads = 4 if kind == "large" else 1
        q, k, v = random_qkv(sum(lengths), 0, heads, 64, dtype).unbind(1)
        if kind == "large":
            # Scores of some hundreds: most weights are 0, a few decide.
            q, k = q * 8, k * 8
        else:
            # Every score near -800 or 800. If a masked key counted as a score of 0, it would win
            # in the one case; exp would overflow without the maximum in the other.
            q, k = q * 0.01 + 10, k * 0.01 + (10 if kind == "all-positive" else -10)
        assert_as_good_as_eager(q, k, v, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_huge_scores_still_give_a_mean_of_values(dtype: torch.dtype) -> None:
    # Scores of ten million, far beyond what float16 holds: eager would be infinite or NaN.
    lengths = (7, 0, 150, 20)
    q, k, v = random_qkv(sum(lengths), 0, 1, 64, dtype).unbind(1)
    out = kernel.attention(q * 1000, k * 1000, v, cumulated(lengths), max(lengths), 1.0)
    step = torch.finfo(dtype).eps * v.abs().max()
    assert bool((out.abs() <= v.abs().max() + step).all())


@pytest.mark.parametrize("intruder", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_sequences_do_not_see_each_other(lengths: tuple[int, ...], intruder: float) -> None:
    packed = random_qkv(sum(lengths), 0, 1, 32, torch.float16)
    cu_seqlens = cumulated(lengths)
    before = kernel.attention(*packed.unbind(1), cu_seqlens, max(lengths), 0.2)
    begin, end = cu_seqlens.tolist()[2:4] if lengths[2] else cu_seqlens.tolist()[3:5]
    outside = torch.ones(len(packed), dtype=torch.bool, device=DEVICE)
    outside[begin:end] = False
    # First in v alone, where a weight of 0 would not stop it, then in k, then in q as well.
    for i_first in (2, 1, 0):
        packed[begin:end, i_first:] = intruder
        after = kernel.attention(*packed.unbind(1), cu_seqlens, max(lengths), 0.2)
        assert torch.equal(after[outside], before[outside])
        assert not after[begin:end].isfinite().any()


@pytest.mark.parametrize("precision", ("highest", "high"))
def test_float32_follows_the_matmul_precision(precision: str) -> None:
    # In the interpreter both are exact; on a GPU "high" is held against eager's own TF32.
    setting = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        q, k, v = random_qkv(200, 0, 2, 64, torch.float32).unbind(1)
        assert_as_good_as_eager(q, k, v, (130, 70))
    finally:
        torch.set_float32_matmul_precision(setting)


@pytest.mark.parametrize("precision", ("ieee", "tf32"))
def test_float32_follows_the_setting_of_cuda_alone(precision: str) -> None:
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:
        pytest.skip("PyTorch has this setting from 2.9 on")
    # Once it says TF32, the older settings raise.
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        assert input_precision(torch.float32) == precision
        assert input_precision(torch.float16) == "tf32", "one kernel, whatever the setting"
    finally:
        torch.backends.cuda.matmul.fp32_precision = setting


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no device to wait for")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_never_waits_for_the_device(lengths: tuple[int, ...]) -> None:
    q, k, v = random_qkv(sum(lengths), 5, 2, 64, torch.float16).unbind(1)
    cu_seqlens = cumulated(lengths)
    kernel.attention(q, k, v, cu_seqlens, max(lengths), 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel.attention(q, k, v, cu_seqlens, max(lengths), 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
