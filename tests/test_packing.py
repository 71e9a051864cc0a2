"""pack and unpack: any mask, round trip, and how often the host waits."""

from typing import Any

import pytest
import torch
from berts import DEVICE
from torch import Tensor

from encoder_fast.backends import cpu, why_not
from encoder_fast.onlookers import Onlookers
from encoder_fast.packing import pack, pack_full, pack_lengths, read_mask

# Where masks are read in different ways.
BACKENDS = [n for n in ("reference", "cpu", "triton") if why_not(n, torch.device(DEVICE)) is None]

HOST = "cpu"  # which reads masks without any padding in a way of its own


def check(mask: Tensor, backend: str = "reference") -> None:
    batch = pack(mask, backend=backend)
    valid = mask != 0
    padded = torch.randn(*mask.shape, 3, device=mask.device)
    packed = batch.pack(padded)
    assert batch.total == int(valid.sum())
    assert batch.max_seqlen == int(valid.sum(1).max() if mask.shape[0] else 0)
    assert batch.cu_seqlens.dtype == torch.int32
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), valid.sum(1).cpu()]).cumsum(0)
    assert batch.cu_seqlens.tolist() == ends.tolist()
    torch.testing.assert_close(packed, padded[valid], rtol=0, atol=0)
    restored = batch.unpack(packed)
    torch.testing.assert_close(restored, padded * valid[..., None], rtol=0, atol=0)
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)[valid]
    assert batch.columns().tolist() == columns.tolist()
    for dtype in (torch.int64, torch.int32):
        for given in (torch.arange(mask.numel(), dtype=dtype).view(mask.shape), mask[:1].long()):
            out = torch.full((batch.total + 3,), -1, device=mask.device)
            batch.pack_into(out, given.to(mask.device))
            assert torch.equal(out[: batch.total], batch.pack(given.to(mask.device)))
            assert out[batch.total :].tolist() == [-1] * 3
    out = torch.full((batch.total + 3,), -1, device=mask.device)
    batch.columns_into(out)
    assert out.tolist() == [*columns.tolist(), -1, -1, -1]
    check_onlookers(mask, padded, backend)


def check_onlookers(mask: Tensor, padded: Tensor, backend: str) -> None:
    """Column 0 of rows that begin with padding comes behind the tokens, if it is asked for."""
    batch, valid = pack(mask, onlookers=True, backend=backend), mask != 0
    rows = [row for row in range(mask.shape[0]) if valid[row].any() and not valid[row, 0]]
    if not rows:
        assert batch.onlooker_rows is None
        return
    assert batch.onlooker_rows is not None
    assert batch.onlooker_rows.tolist() == rows
    packed = batch.pack(padded)
    assert torch.equal(packed, torch.cat([padded[valid], padded[rows, 0]]))
    assert batch.columns().tolist()[batch.total :] == [0] * len(rows)
    tokens = padded * valid[..., None]
    assert torch.equal(batch.unpack(packed), tokens)
    tokens[rows, 0] = padded[rows, 0]
    assert torch.equal(batch.unpack(packed, onlookers=True), tokens)
    some = valid.any(dim=1)
    assert torch.equal(batch.first_tokens(packed)[some], padded[some, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.int32])
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(["1111", "1100", "1000"], id="right"),
        pytest.param(["1111", "0011", "0001"], id="left"),
        pytest.param(["1011", "0101", "1001"], id="holes"),
        pytest.param(["0000", "1100", "0000"], id="empty-rows"),
        pytest.param(["0000"], id="nothing"),
        pytest.param(["1111", "1111"], id="full"),
    ],
)
def test_any_mask(rows: list[str], dtype: torch.dtype, backend: str) -> None:
    check(torch.tensor([[int(c) for c in row] for row in rows]).to(DEVICE, dtype), backend)


def test_random_masks() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=200, deadline=None)
    @hypothesis.given(data=st.data(), batch=st.integers(0, 5), length=st.integers(1, 9))
    def check_one(data: Any, batch: int, length: int) -> None:
        bits = data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
        check(torch.tensor(bits, dtype=torch.bool).view(batch, length))

    check_one()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_or_no_columns(backend: str) -> None:
    batch = pack(torch.ones(0, 5, device=DEVICE), backend=backend)
    assert (batch.total, batch.max_seqlen, batch.cu_seqlens.tolist()) == (0, 0, [0])
    assert batch.unpack(torch.zeros(0, 4)).shape == (0, 5, 4)
    batch = pack(torch.ones(2, 0, device=DEVICE), backend=backend)
    assert (batch.total, batch.max_seqlen, batch.cu_seqlens.tolist()) == (0, 0, [0, 0, 0])


def test_lengths_agree_with_the_mask() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=100, deadline=None)
    @hypothesis.given(lengths=st.lists(st.integers(0, 9), max_size=6), extra=st.integers(0, 3))
    def check_one(lengths: list[int], extra: int) -> None:
        check_lengths(lengths, extra)

    check_one()


def check_lengths(lengths: list[int], extra: int) -> None:
    padded = max(lengths, default=0) + extra
    mask = torch.arange(padded)[None] < torch.tensor(lengths, dtype=torch.int64)[:, None]
    ours, theirs = pack_lengths(lengths, padded_length=padded), pack(mask)
    assert ours.cu_seqlens.tolist() == theirs.cu_seqlens.tolist()
    assert (ours.total, ours.max_seqlen, ours.shape) == (
        theirs.total,
        theirs.max_seqlen,
        theirs.shape,
    )
    assert ours.columns().tolist() == theirs.columns().tolist()


@pytest.mark.parametrize("mask", [[[1, 1, 0], [0, 1, 1]], [[1, 1, 1], [1, 1, 1]]])
def test_filler_stands_behind_the_tokens(mask: list[list[int]]) -> None:
    plain = pack(torch.tensor(mask))
    filled = plain.filled(8)
    padded = torch.randn(2, 3, 5)
    packed = filled.pack(padded)
    assert packed.shape == (8, 5) and not packed[plain.total :].any()
    assert torch.equal(filled.without_filler(packed), plain.pack(padded))
    assert torch.equal(filled.unpack(packed), plain.unpack(plain.pack(padded)))
    assert filled.columns().tolist() == [*plain.columns().tolist(), *[0] * (8 - plain.total)]
    assert torch.equal(filled.first_tokens(packed), plain.first_tokens(plain.pack(padded)))


def test_where_filler_has_no_place() -> None:
    onlookers = pack(torch.tensor([[0, 1]]), onlookers=True)
    assert onlookers.filled(8) is onlookers
    nothing = pack(torch.zeros(2, 3))
    assert nothing.filled(8) is nothing


def test_sizes_that_gemms_run_in() -> None:
    sizes = [cpu.rows_to_compute(rows) for rows in range(1, 8193)]
    for rows, size in enumerate(sizes, 1):
        assert rows <= size < rows + min(64, max(1, rows / 16)) + 1e-9
        assert cpu.rows_to_compute(size) == size
    assert len(set(sizes)) < 240


def test_no_padding_is_a_view() -> None:
    padded = torch.randn(2, 3, 4)
    batch = pack(torch.ones(2, 3))
    assert batch.indices is None
    assert batch.pack(padded).data_ptr() == padded.data_ptr()
    assert batch.unpack(batch.pack(padded)).data_ptr() == padded.data_ptr()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(torch.ones(3)), r"shape \(B, S\), got \(3,\)"),
        (lambda: pack(torch.tensor([[1, 2]])), "0 and 1 only"),
        (lambda: pack(torch.tensor([[1.0, 0.5]])), "0 and 1 only"),
        (lambda: pack(torch.tensor([[1.0, torch.nan]]), backend=HOST), "0 and 1 only"),
        (lambda: pack(torch.tensor([[2, 2]]), backend=HOST), "0 and 1 only"),
        (lambda: pack_lengths([3, -1]), r"lie in \[0, 3\], got \[3, -1\]"),
        (lambda: pack_lengths([5], padded_length=4), r"lie in \[0, 4\], got \[5\]"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_mask_facts() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    ids = torch.tensor([[1, 2, 99], [99, 5, 6], [99, 99, 99]])
    facts = read_mask(mask, ids, vocab_size=7)
    assert (facts.total, facts.max_seqlen, facts.is_binary) == (4, 2, True)
    assert facts.headless == 1  # row 1 begins with padding; row 2 has no token at all
    assert facts.ids_in_range  # 99 stands on padding alone
    assert not read_mask(mask, ids, vocab_size=7, onlookers=True).ids_in_range
    ids[1, 0] = 6
    assert read_mask(mask, ids, vocab_size=7, onlookers=True).ids_in_range
    assert not read_mask(mask, ids, vocab_size=6).ids_in_range


def test_host_waits_at_most_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "cpu", "numpy"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: object, _name: str = name, _run: object = original):
            waits.append(_name)
            return _run(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    pack(torch.tensor([[1, 0], [1, 1]]))
    assert waits == ["tolist"]
    Onlookers.of(pack(torch.tensor([[0, 1], [1, 1]]), onlookers=True))
    assert waits == ["tolist"] * 2
    waits.clear()
    pack_full(2, 5, "cpu").columns()
    assert waits == []


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_device_is_waited_for_at_most_once(backend: str) -> None:
    mask = torch.tensor([[0, 0, 1], [1, 1, 0]], device="cuda")
    facts = read_mask(mask, backend=backend)  # the one wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = pack(mask, facts, onlookers=True, backend=backend)
        onlookers = Onlookers.of(batch)
        assert onlookers is not None
        qkv = batch.pack(torch.ones(2, 3, 3, 2, 16, device="cuda"))
        onlookers.attend(*qkv.unbind(1), 0.25, torch.empty_like(qkv[:, 0]))
        batch.unpack(batch.pack(torch.ones(2, 3, 4, device="cuda")))
        pack_lengths([2, 0, 3], device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("row", "gaps"),
    [("1111", 0), ("1100", 0), ("0011", 0), ("0110", 0), ("0000", 0), ("1011", 1), ("0101", 1)],
)
def test_gaps(row: str, gaps: int) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [int(value) for value in row]], device=DEVICE)
    assert read_mask(mask).has_gaps == bool(gaps)
