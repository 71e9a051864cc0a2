"""The CUDA attention kernels against a float64 softmax of every sequence by itself.

They run on the GPU where there is one and the extension is built, and over the emulation elsewhere:
slow, so that sizes are small, but it finds reads outside the operands, races and missed barriers by
itself. Every input lies in a buffer that is NaN around it, and every output starts as NaN.
"""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import pytest
import torch
from attention_oracle import cumulated, name_of, random_qkv, softmax_attention
from kernel_backends import DEVICE, kernel_backends
from torch import Tensor

from encoder_fast.backends import load

BACKENDS = [name for name in kernel_backends() if name.startswith("cuda")]
pytestmark = pytest.mark.skipif(
    not BACKENDS, reason="neither the extension nor its emulation is here"
)
on_gpu_alone = pytest.mark.skipif(DEVICE == "cpu", reason="would take minutes in the emulation")

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16)

# One entry a length class of csrc/attention/launcher.cuh, each with lengths on and to either side
# of its tile edges, and with empty sequences at the front, inside and at the end.
LENGTHS = {
    "up-to-32": (0, 1, 15, 16, 17, 0, 0, 32, 31, 2, 0),
    "up-to-64": (63, 64, 0, 1, 33),
    "up-to-128": (127, 65, 0, 128, 1, 16, 0),
    "up-to-256": (0, 129, 200, 0, 255, 256),
    "longer": (257, 0, 300, 129),
}

# Tiles and fragments of 16, 64, 128 and 256 rows or keys have their edges here.
EDGES = (1, 15, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129, 192, 255, 256, 257, 300, 385)


@pytest.fixture(params=BACKENDS or ["cuda"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    backend = load(request.param)
    empty = torch.empty

    def empty_of_nan(*size: object, **options: object) -> Tensor:
        # 255 in each byte of the workspace: an entry of the list that was not written shows too.
        tensor = empty(*size, **options)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", empty_of_nan)
    return backend


def assert_as_good_as_eager(
    kernel: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    scale: float | None = None,
    longest: int | None = None,
) -> None:
    scale = q.shape[2] ** -0.5 if scale is None else scale
    longest = max(lengths, default=0) if longest is None else longest
    out = kernel.attention(q, k, v, cumulated(lengths), longest, scale)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()

    reference = softmax_attention(q, k, v, lengths, scale, torch.float64)
    eager = softmax_attention(q, k, v, lengths, scale, q.dtype).double()
    largest = reference.abs().max().item() if reference.numel() else 0.0
    _, exponent = torch.frexp(torch.tensor(largest))
    rounding_step = torch.finfo(q.dtype).eps * 2.0 ** (exponent.item() - 1) if largest else 0.0
    error = (out.double() - reference).abs()
    bound = 2 * (eager - reference).abs().max().item() + rounding_step if largest else 0.0
    # A NaN compares as false, so it fails here too.
    assert bool((error <= bound).all()), f"error {error.max().item():.3e}, bound {bound:.3e}"

    tail = out[sum(lengths) :]
    assert torch.equal(tail, torch.zeros_like(tail))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"D{head_dim}")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_tile(
    kernel: ModuleType, lengths: tuple[int, ...], head_dim: int, dtype: torch.dtype
) -> None:
    # Three heads: not a power of two. Five rows of tail: less than a tile.
    q, k, v = random_qkv(sum(lengths), 5, 3, head_dim, dtype).unbind(1)
    assert_as_good_as_eager(kernel, q, k, v, lengths)


@pytest.mark.parametrize("head_dim", (32, 64), ids=lambda head_dim: f"D{head_dim}")
@pytest.mark.parametrize("length", EDGES)
def test_one_sequence_of(kernel: ModuleType, length: int, head_dim: int) -> None:
    q, k, v = random_qkv(length, 0, 1, head_dim, torch.float16).unbind(1)
    assert_as_good_as_eager(kernel, q, k, v, (length,))


def test_long_sequence(kernel: ModuleType) -> None:
    # 17 tiles of keys: rounding errors of the running sums would add up.
    q, k, v = random_qkv(1025, 0, 1, 32, torch.float16).unbind(1)
    assert_as_good_as_eager(kernel, q, k, v, (1025,))


@on_gpu_alone
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"D{head_dim}")
def test_longest_sequence_among_short_ones(
    kernel: ModuleType, head_dim: int, dtype: torch.dtype
) -> None:
    # 17,000 is beyond the longest length that the list tells apart.
    lengths = (3, 8192, 0, 700, 8191, *[60] * 2000, 17_000)
    q, k, v = random_qkv(sum(lengths), 100, 2, head_dim, dtype).unbind(1)
    assert_as_good_as_eager(kernel, q, k, v, lengths)


@pytest.mark.parametrize("heads", (1, 12), ids=lambda heads: f"H{heads}")
@pytest.mark.parametrize("lengths", ((17, 3, 0, 32, 5), (70, 1, 130)), ids=("short", "long"))
def test_heads(kernel: ModuleType, lengths: tuple[int, ...], heads: int) -> None:
    # One head leaves three warps of the last block of short sequences without work.
    q, k, v = random_qkv(sum(lengths), 0, heads, 32, torch.float16).unbind(1)
    assert_as_good_as_eager(kernel, q, k, v, lengths)


# (longest sequence, rows of a tile) of the classes that may have several tiles a sequence.
@pytest.mark.parametrize(
    ("lengths", "head_dim", "tile_rows"),
    (
        ((300, 129, *[2, 0] * 40, 0, 257), 32, 128),
        # More sequences than the list has threads; most of them are empty.
        ((*[0] * 300, 130, *[1, 0, 0, 0, 0, 0] * 50, 140), 32, 128),
        ((100, *[3] * 30, 0, 65), 128, 64),
        ((300, *[5] * 12), 64, 128),
        # As many tiles as the workspace has room for: with the tail 200 tokens, 3 whole tiles.
        ((65, 65, 65), 128, 64),
    ),
    ids=("longer-D32", "up-to-256-D32", "up-to-128-D128", "longer-D64", "full-D128"),
)
def test_tiles_from_the_list(
    kernel: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[int, ...],
    head_dim: int,
    tile_rows: int,
) -> None:
    heads = 2 if DEVICE == "cpu" else 64  # more tiles than a device holds at once
    workspaces: list[Tensor] = []
    empty = torch.empty

    def empty_kept(*size: object, **options: object) -> Tensor:
        tensor = empty(*size, **options)  # type: ignore[call-overload]
        if tensor.dtype == torch.uint8:
            workspaces.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", empty_kept)
    q, k, v = random_qkv(sum(lengths), 5, heads, head_dim, torch.float16).unbind(1)
    assert_as_good_as_eager(kernel, q, k, v, lengths)

    begins = list(itertools.accumulate(lengths, initial=0))
    expected = {
        (begin, length, row)
        for begin, length in zip(begins, lengths, strict=False)
        for row in range(0, length, tile_rows)
    }
    (workspace,) = workspaces
    (n_tiles, *_), *entries = workspace.view(torch.int32).view(-1, 4).tolist()
    listed = [tuple(entry[:3]) for entry in entries[:n_tiles]]
    assert len(listed) == len(expected) and set(listed) == expected
    steps = [(length + 63) // 64 for _, length, _ in listed]
    assert steps == sorted(steps, reverse=True), "the longest go first"


@pytest.mark.parametrize("tail", (1, 64, 700))
@pytest.mark.parametrize(
    "lengths", ((20, 0, 30), (60, 9), (100, 3), (300, *[1] * 20)), ids=("32", "64", "128", "list")
)
def test_tokens_of_no_sequence_are_zero(
    kernel: ModuleType, lengths: tuple[int, ...], tail: int
) -> None:
    # 700 rows are more than one pass of the blocks that there are for these lengths.
    q, k, v = random_qkv(sum(lengths), tail, 2, 32, torch.float16).unbind(1)
    assert_as_good_as_eager(kernel, q, k, v, lengths)


@pytest.mark.parametrize("tail", (0, 70))
@pytest.mark.parametrize("lengths", ((), (0,), (0, 0, 0)), ids=("B0", "B1", "B3"))
def test_nothing_to_attend_to(kernel: ModuleType, lengths: tuple[int, ...], tail: int) -> None:
    q, k, v = random_qkv(0, tail, 2, 64, torch.float16).unbind(1)
    assert_as_good_as_eager(kernel, q, k, v, lengths)


@pytest.mark.parametrize("longest", (40, 80, 200, 10_000), ids=lambda longest: f"max{longest}")
def test_max_seqlen_may_be_larger_than_any_sequence(kernel: ModuleType, longest: int) -> None:
    # As when a bucket of a CUDA graph stands in for the batch: empty tiles behind every sequence.
    # More tokens than 200, or the launcher would see that none can be as long.
    lengths = (5, 0, 30, *[7] * 20)
    q, k, v = random_qkv(sum(lengths), 200, 2, 32, torch.float16).unbind(1)
    assert_as_good_as_eager(kernel, q, k, v, lengths, longest=longest)


@pytest.mark.parametrize("layout", ("separate", "head-major", "padded-rows", "shared-keys"))
def test_strides(kernel: ModuleType, layout: str) -> None:
    total, heads, head_dim = 150, 3, 32
    packed = random_qkv(total, 0, heads, head_dim, torch.float16)
    q, k, v = packed.unbind(1)
    if layout == "separate":
        q, k, v = q.clone(), k.clone(), v.clone()
    elif layout == "head-major":
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    elif layout == "padded-rows":
        # The strides of q, k and v all differ, and there is NaN between the rows.
        width = heads * head_dim
        rows = [torch.full((total, width + pad), float("nan")) for pad in (8, 24, 40)]
        rows = [x.to(device=DEVICE, dtype=q.dtype) for x in rows]
        for row, x in zip(rows, (q, k, v), strict=True):
            row[:, 8 : 8 + width] = x.reshape(total, -1)
        q, k, v = (x[:, 8 : 8 + width].unflatten(1, (heads, -1)) for x in rows)
    else:
        # One head of keys and values for all heads of queries: a stride of 0.
        k, v = (x[:, :1].expand(total, heads, head_dim) for x in (k, v))
    for lengths in ((32, 3, 30, 0, 30, 28, 27), (70, 1, 66, 13), (150,)):
        assert_as_good_as_eager(kernel, q, k, v, lengths)


@pytest.mark.parametrize("which", ("q", "k", "v"))
def test_rows_that_are_not_aligned_raise(kernel: ModuleType, which: str) -> None:
    heads = {name: torch.zeros(10, 2, 32, dtype=torch.float16, device=DEVICE) for name in "qkv"}
    shifted = torch.zeros(10 * 64 + 1, dtype=torch.float16, device=DEVICE)[1:].view(10, 2, 32)
    with pytest.raises(ValueError, match=f"{which} must begin"):
        kernel.attention(*(heads | {which: shifted}).values(), cumulated((10,)), 10, 1.0)
    padded = torch.zeros(10, 65, dtype=torch.float16, device=DEVICE)[:, :64].unflatten(1, (2, 32))
    with pytest.raises(ValueError, match=f"{which}'s row stride"):
        kernel.attention(*(heads | {which: padded}).values(), cumulated((10,)), 10, 1.0)


def test_more_than_32_bits_can_number_is_refused(kernel: ModuleType) -> None:
    one = torch.zeros(1, 1, 32, dtype=torch.float16, device=DEVICE)
    q = one.expand(2**31, 1, 32)
    with pytest.raises(ValueError, match=r"2\*\*31 - 1 tokens at most, got 2147483648"):
        kernel.attention(q, q, q, cumulated((2**30,)), 2**30, 0.2)
    # 2**16 sequences and 2**15 heads, one token: as many tiles, most of them empty.
    q = one.expand(1, 2**15, 32).contiguous()
    cu_seqlens = torch.zeros(2**16 + 1, dtype=torch.int32, device=DEVICE)
    cu_seqlens[-1] = 1
    with pytest.raises(RuntimeError, match="too many tiles"):
        kernel.attention(q, q, q, cu_seqlens, 1, 0.2)


@pytest.mark.large_memory
def test_rows_beyond_32_bits_of_offset(kernel: ModuleType) -> None:
    # 33 rows, 2**26 elements apart: the last begins at 2**31. Pages not touched take no memory.
    try:
        storage = torch.empty_strided((2**31 + 96,), (1,), dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"4 GiB cannot be had: {error}")
    q, k, v = (storage[32 * i :].as_strided((33, 1, 32), (2**26, 32, 1)) for i in range(3))
    for x in (q, k, v):
        x.copy_(torch.randn(33, 1, 32))
    assert_as_good_as_eager(kernel, q, k, v, (33,))
    # One that begins there.
    assert_as_good_as_eager(kernel, q, k, v, (32, 1))


@on_gpu_alone
@pytest.mark.large_memory
def test_outputs_beyond_32_bits_of_offset(kernel: ModuleType) -> None:
    # 2**31 elements and more; all sequences attend to the same 64 rows.
    heads, head_dim, length, batch = 64, 128, 64, 4097
    rows = random_qkv(length, 0, heads, head_dim, torch.float16)
    q, k, v = rows.repeat(batch, 1, 1, 1).unbind(1)
    cu_seqlens = torch.arange(0, length * batch + 1, length, dtype=torch.int32, device=DEVICE)
    out = kernel.attention(q, k, v, cu_seqlens, length, 0.1).unflatten(0, (batch, length))
    first = kernel.attention(*rows.unbind(1), cumulated((length,)), length, 0.1)
    assert bool((out == first).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", ("large", "all-negative", "all-positive", "rising", "falling"))
def test_extreme_scores(kernel: ModuleType, kind: str, dtype: torch.dtype) -> None:
    for lengths in ((7, 30, 0, 25), (64, 3, 40), (330, 65)):
        # Many rows for the scores where single ones decide, or the largest error would be luck.
        heads = 4 if kind == "large" and max(lengths) < 300 else 1
        q, k, v = random_qkv(sum(lengths), 0, heads, 64, dtype).unbind(1)
        if kind == "large":
            # Scores of some hundreds: most weights are 0, a few decide.
            q, k = q * 8, k * 8
        elif kind in ("rising", "falling"):
            # From tile to tile the maximum moves by less than what makes it be taken, then by more.
            steps = torch.arange(sum(lengths), device=DEVICE) / sum(lengths)
            steps = (steps if kind == "rising" else 1 - steps).square()
            q, k = q * 0.1 + 2, k * 0.1 + 3 * steps[:, None, None].to(dtype)
        else:
            # Every score near -800 or 800. If a masked key counted as a score of 0, it would win
            # in the one case; exp would overflow without the maximum in the other.
            q, k = q * 0.01 + 10, k * 0.01 + (10 if kind == "all-positive" else -10)
        assert_as_good_as_eager(kernel, q, k, v, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("step", (7, 9, 15, 17, 23, 40, 130))
def test_maxima_that_rise_from_tile_to_tile(
    kernel: ModuleType, step: int, dtype: torch.dtype
) -> None:
    """By `step` in powers of two, and the last tile goes first.

    Up to 8 nothing is rescaled, and weights of 2**7 come out right. From 16 on weights that were
    not rescaled are infinite in float16, and from 128 on in bfloat16 and in the sums too.
    """
    # Heads of 64: those of 32 have all these keys in one tile.
    length = 3 * 64
    q, k, v = random_qkv(length, 0, 1, 64, dtype).unbind(1)
    # Beside the noise of all other columns, q k is the step of the tile in powers of two.
    q[..., 0] = 1.0
    q[::3, :, 0] = 0.0  # some rows of each warp stay where they are
    k[..., 0] = torch.tensor([1.0, 2.0, 0.0], device=DEVICE).repeat_interleave(64)[:, None] * step
    q[..., 1:] *= 0.1
    assert_as_good_as_eager(kernel, q, k, v, (length,), scale=math.log(2))


@pytest.mark.parametrize("scale", (1e-4, 0.3, 1.0, 7.5))
def test_scale(kernel: ModuleType, scale: float) -> None:
    for lengths in ((20, 3), (90, 40), (300,)):
        q, k, v = random_qkv(sum(lengths), 0, 2, 32, torch.float16).unbind(1)
        assert_as_good_as_eager(kernel, q, k, v, lengths, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_huge_scores_still_give_a_mean_of_values(kernel: ModuleType, dtype: torch.dtype) -> None:
    # Scores of ten million, far beyond what float16 holds: eager would be infinite or NaN.
    for lengths in ((7, 0, 150, 20), (300,)):
        q, k, v = random_qkv(sum(lengths), 0, 2, 64, dtype).unbind(1)
        out = kernel.attention(q * 1000, k * 1000, v, cumulated(lengths), max(lengths), 1.0)
        step = torch.finfo(dtype).eps * v.abs().max()
        assert bool((out.abs() <= v.abs().max() + step).all())


@pytest.mark.parametrize("scale", (0.125, 2.0))
@pytest.mark.parametrize("length", (70, 200, 300))
def test_keys_that_score_minus_infinity_get_no_weight(
    kernel: ModuleType, length: int, scale: float
) -> None:
    # All keys of the tile that goes first: what follows must not come out as NaN. A scale above 1
    # takes the lowest finite number beyond the range too.
    q, k, v = random_qkv(length, 0, 1, 64, torch.float16).unbind(1)
    q.abs_()
    k[length - length % 64 :] = float("-inf")
    assert_as_good_as_eager(kernel, q, k, v, (length,), scale)


@pytest.mark.parametrize("intruder", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_sequences_do_not_see_each_other(
    kernel: ModuleType, lengths: tuple[int, ...], intruder: float
) -> None:
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


@on_gpu_alone
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_never_waits_for_the_device(kernel: ModuleType, lengths: tuple[int, ...]) -> None:
    q, k, v = random_qkv(sum(lengths), 5, 2, 64, torch.float16).unbind(1)
    cu_seqlens = cumulated(lengths)
    first = kernel.attention(q, k, v, cu_seqlens, max(lengths), 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = kernel.attention(q, k, v, cu_seqlens, max(lengths), 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
