"""The kernels of disentangled attention against float64, each sequence by itself.

The same bodies run on the GPU where there is one, and elsewhere through Triton's interpreter and
over the emulation of `csrc/`. Every input lies in a buffer that is NaN around it, and every output
starts as NaN, so a row read or left out by mistake shows.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from disentangled_oracle import Problem, problem, spread
from kernel_backends import DEVICE, kernel_backends
from torch import Tensor

from encoder_fast.backends import load
from encoder_fast.kernels import disentangled_attention as triton_kernel

BACKENDS = kernel_backends()
CUDA = [name for name in BACKENDS if "cuda" in name]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Tiles are 32 keys by 32 or 64 queries: lengths on and to either side of their edges, and empty
# sequences at the front, inside and at the end.
LENGTHS = {
    "short": (0, 1, 15, 16, 17, 0, 0, 31, 32, 2, 0),
    "long": (63, 64, 0, 65, 33, 1, 0),
    "longer": (127, 0, 129),
}


@pytest.fixture(params=BACKENDS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    backend = load(request.param)
    empty = torch.empty

    def empty_of_nan(*size: object, **options: object) -> Tensor:
        tensor = empty(*size, **options)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", empty_of_nan)
    return backend


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def run(kernel: ModuleType, one: Problem) -> Tensor:
    if one.q.dtype not in kernel.DTYPES:
        pytest.skip(f"backend {kernel.__name__!r} attends in half precision alone")
    sizes = getattr(kernel, "HEAD_SIZES_OF_OP", {}).get("disentangled_attention")
    if sizes is not None and one.q.shape[2] not in sizes:
        pytest.skip(f"backend {kernel.__name__!r} has heads of {sorted(sizes)}")
    return kernel.disentangled_attention(*one.arguments)


@pytest.mark.parametrize("terms", ("c2p+p2c", "c2p", "p2c"))
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lengths_and_terms(kernel: ModuleType, lengths: tuple[int, ...], terms: str) -> None:
    # Three heads: not a power of two. Five rows of tail: less than a tile.
    one = problem(lengths, torch.float16, heads=3, terms=terms, tail=5, device=DEVICE)
    one.check(run(kernel, one))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head_dim", (16, 32, 64, 96, 128), ids=lambda head_dim: f"D{head_dim}")
def test_head_sizes(kernel: ModuleType, head_dim: int, dtype: torch.dtype) -> None:
    one = problem((40, 0, 66), dtype, heads=1, head_dim=head_dim, device=DEVICE)
    one.check(run(kernel, one))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
def test_cards_with_less_shared_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Triton takes tiles of 32 queries for long sequences too. In float32 no tile depends on it.
    monkeypatch.setattr(triton_kernel, "shared_memory", lambda device: 99 * 1024)
    for terms in ("c2p+p2c", "c2p", "p2c"):
        one = problem((97, 0, 33, 64), dtype, heads=1, terms=terms, device=DEVICE)
        one.check(triton_kernel.disentangled_attention(*one.arguments))


@pytest.mark.parametrize(
    ("span", "buckets", "end"),
    ((256, 256, 512), (8, 8, 20), (200, 0, 0), (20, 0, 0), (1, 0, 0)),
    ids=("v3", "log", "clamped-beyond", "clamped", "one-row-each-way"),
)
def test_spans(kernel: ModuleType, span: int, buckets: int, end: int) -> None:
    one = problem(
        *((150, 20), torch.float16),
        **{"span": span, "buckets": buckets, "max_distance": end, "device": DEVICE},
    )
    one.check(run(kernel, one))


def test_any_rows(kernel: ModuleType) -> None:
    # A DeBERTa's two farthest distances share a row, which would hide an end that is off by one.
    spans = {"span": 8, "buckets": 8, "max_distance": 20}
    one = problem((40, 5), kernel.DTYPES[0], **spans, device=DEVICE)
    assert 2 * one.longest > len(one.row_of_distance)
    rows = torch.randint_like(one.row_of_distance, len(one.pos_key))
    one = replace(one, row_of_distance=rows)
    one.check(run(kernel, one))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
def test_long_sequence(kernel: ModuleType, dtype: torch.dtype) -> None:
    # Eleven key tiles: positions are carried from one to the next.
    one = problem((340,), dtype, heads=1, device=DEVICE)
    one.check(run(kernel, one))


@pytest.mark.skipif(DEVICE == "cpu", reason="takes minutes in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_longest_sequence_among_short_ones(kernel: ModuleType, dtype: torch.dtype) -> None:
    one = problem(
        *((3, 4096, 0, 700, 2047), dtype),
        **{"heads": 4, "head_dim": 64, "span": 256, "buckets": 256, "max_distance": 512},
        **{"tail": 100, "device": DEVICE},
    )
    one.check(run(kernel, one))


@pytest.mark.parametrize(
    "lengths",
    ((64, 64, 64), (40, 40), (150, *[2] * 20), (150, *[0] * 20, 70), (1,) * 30),
    ids=("plain", "plain-part", "slots", "slots-empty", "ones"),
)
def test_every_way_to_cut_the_tokens(kernel: ModuleType, lengths: tuple[int, ...]) -> None:
    one = problem(lengths, torch.float16, heads=1, device=DEVICE)
    one.check(run(kernel, one))


@pytest.mark.parametrize("tail", (0, 1, 300))
@pytest.mark.parametrize("lengths", ((), (0,), (0, 0, 0), (40, 3)), ids=("B0", "B1", "B3", "two"))
def test_tokens_of_no_sequence_are_zero(
    kernel: ModuleType, lengths: tuple[int, ...], tail: int
) -> None:
    one = problem(lengths, torch.float16, tail=tail, device=DEVICE)
    one.check(run(kernel, one))


def test_max_seqlen_may_be_larger_than_any_sequence(kernel: ModuleType) -> None:
    # As when a bucket of a CUDA graph stands in for the batch: empty tiles behind every sequence.
    one = problem((5, 0, 70), torch.float16, device=DEVICE)
    expected = run(kernel, one)
    arguments = list(one.arguments)
    arguments[-2] = 512
    assert torch.equal(kernel.disentangled_attention(*arguments), expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=name_of)
def test_strides(kernel: ModuleType, dtype: torch.dtype) -> None:
    one = problem((40, 9), dtype, heads=3, device=DEVICE)
    spread(one).check(run(kernel, spread(one)))


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=name_of)
def test_rows_that_are_not_aligned(kernel: ModuleType, dtype: torch.dtype) -> None:
    one = problem((40, 9), dtype, heads=3, device=DEVICE)
    # No row starts at a multiple of 16 bytes, and the strides all differ.
    moved = {}
    for pad, name in enumerate(("q", "k", "v", "pos_key", "pos_query"), start=1):
        x = getattr(one, name)
        rows = torch.full((len(x), x[0].numel() + 2 * pad - 1), float("nan")).to(x)
        rows[:, 1 - pad % 2 : x[0].numel() + 1 - pad % 2] = x.flatten(1)
        moved[name] = rows[:, 1 - pad % 2 : x[0].numel() + 1 - pad % 2].unflatten(1, x.shape[1:])
    if "cuda" not in kernel.__name__:
        one = replace(one, **moved)
        one.check(run(kernel, one))
        return
    for name, x in moved.items():
        with pytest.raises(ValueError, match=f"16 bytes at a time: {name}'s row stride"):
            run(kernel, replace(one, **{name: x}))


@pytest.mark.skipif(not CUDA, reason="neither the extension nor its emulation is here")
@pytest.mark.parametrize("terms", ("c2p+p2c", "c2p", "p2c"))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
def test_edges_of_the_tiles_of_cuda(dtype: torch.dtype, terms: str) -> None:
    # Tiles of 32 keys by 64 or 128 queries; the ring of positions goes round from 192 keys on.
    for length in (1, 8, 31, 32, 33, 63, 64, 65, 96, 127, 129, 161, 193, 260):
        one = problem((length,), dtype, heads=1, head_dim=64, terms=terms, device=DEVICE)
        one.check(load(CUDA[0]).disentangled_attention(*one.arguments))


@pytest.mark.skipif(not CUDA, reason="neither the extension nor its emulation is here")
def test_strides_beyond_the_pointers_of_cuda() -> None:
    one = problem((2,), torch.float16, heads=1, tail=0, device=DEVICE)
    far = torch.empty(2**25 + 32, dtype=torch.float16, device=DEVICE)
    one = replace(one, k=far.as_strided((2, 1, 32), (2**25, 32, 1)))
    with pytest.raises(ValueError, match=r"row stride of k, .* below 33554432 elements"):
        load(CUDA[0]).disentangled_attention(*one.arguments)


@pytest.mark.large_memory
def test_rows_beyond_32_bits_of_offset(kernel: ModuleType) -> None:
    # In elements for Triton, whose next tile is as far away; for CUDA C++, which has rows 2**25
    # elements apart at most, in bytes. Pages not touched take no memory.
    length, apart = (70, 2**24) if "cuda" in kernel.__name__ else (33, 2**26)
    one = problem((length,), torch.float16, heads=1, tail=0, device=DEVICE)
    try:
        storage = torch.empty_strided((length * apart,), (1,), dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"{length * apart >> 29} GiB cannot be had: {error}")
    far = {}
    for i, name in enumerate(("q", "k", "v")):
        far[name] = storage[32 * i :].as_strided((length, 1, 32), (apart, 32, 1))
        far[name].copy_(getattr(one, name))
    for lengths in ((length,), (1, length - 1)):
        one = replace(one, lengths=lengths, **far)
        one.check(run(kernel, one))


@pytest.mark.parametrize("length", (40, 70, 130))
def test_keys_that_score_minus_infinity_get_no_weight(kernel: ModuleType, length: int) -> None:
    # All keys of the tile that goes first: what follows must not come out as NaN.
    one = problem((length,), torch.float16, heads=1, terms="c2p", device=DEVICE)
    one.q.abs_()
    one.k[length - length % 32 : length] = float("-inf")
    one.check(run(kernel, one))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", ("large", "all-negative", "all-positive"))
def test_extreme_scores(kernel: ModuleType, kind: str, dtype: torch.dtype) -> None:
    # Many rows for the scores where single ones decide, or the largest error would be luck.
    one = problem((66, 5), dtype, heads=4 if kind == "large" else 1, device=DEVICE)
    if kind == "large":
        # Scores of some hundreds: most weights are 0, a few decide.
        one = replace(one, q=one.q * 8, k=one.k * 8)
    else:
        # Had a masked key a score of 0, it would win in the one case; exp would overflow in the
        # other without the maximum.
        sign = 10 if kind == "all-positive" else -10
        one = replace(one, q=one.q * 0.01 + 10, k=one.k * 0.01 + sign)
    one.check(run(kernel, one))


@pytest.mark.parametrize("intruder", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("lengths", ((20, 31, 7), (40, 70, 33)), ids=("short", "long"))
def test_sequences_do_not_see_each_other(
    kernel: ModuleType, lengths: tuple[int, ...], intruder: float
) -> None:
    one = problem(lengths, torch.float16, heads=1, tail=0, device=DEVICE)
    before = run(kernel, one)
    begin, end = lengths[0], lengths[0] + lengths[1]
    outside = torch.ones(len(before), dtype=torch.bool, device=DEVICE)
    outside[begin:end] = False
    for x in (one.v, one.k, one.q):
        x[begin:end] = intruder
        after = run(kernel, one)
        assert torch.equal(after[outside], before[outside])
        assert not after[begin:end].isfinite().any()


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no device to wait for")
def test_never_waits_for_the_device(kernel: ModuleType) -> None:
    one = problem((5, 0, 70), torch.float16, head_dim=64, device=DEVICE)
    arguments = one.arguments
    kernel.disentangled_attention(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel.disentangled_attention(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
