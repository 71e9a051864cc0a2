"""The kernels embed_layer_norm."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from kernel_backends import kernel_backends
from layer_norm_oracle import (
    DEVICE,
    DTYPES,
    dtype_name,
    error_bound,
    guarded_empty,
    layer_norm_float64,
    max_error,
    surrounded_by_nan,
)
from torch import Tensor

from encoder_fast.backends import load

EPS = 1e-12


@pytest.fixture(params=kernel_backends())
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """A backend with kernels of its own."""
    return load(request.param)


@dataclass
class Embeddings:
    """Three tables and the ids of some tokens. An absent table and its ids are None."""

    input_ids: Tensor
    position_ids: Tensor | None
    token_type_ids: Tensor | None
    word: Tensor
    position: Tensor | None
    token_type: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def run(self, kernels: ModuleType) -> Tensor:
        with guarded_empty():
            return kernels.embed_layer_norm(**vars(self), eps=EPS)

    def rows(self) -> list[Tensor]:
        """What each table gives for each token, in the order in which Hugging Face adds it."""
        pairs = (
            (self.word, self.input_ids),
            (self.token_type, self.token_type_ids),
            (self.position, self.position_ids),
        )
        return [table[ids.long()] for table, ids in pairs if table is not None]

    def eager(self) -> Tensor:
        h, *rest = self.rows()
        for term in rest:
            h = h + term
        vectors = [v for v in (self.weight, self.bias) if v is not None]
        if any(v.dtype != h.dtype for v in vectors):
            return F.layer_norm(h.float(), h.shape[1:], self.weight, self.bias, EPS).to(h.dtype)
        return F.layer_norm(h, h.shape[1:], self.weight, self.bias, EPS)

    def reference(self) -> Tensor:
        return layer_norm_float64(self.rows(), self.weight, self.bias, EPS)

    def check(self, kernels: ModuleType) -> None:
        out = self.run(kernels)
        assert out.shape == (self.input_ids.shape[0], self.word.shape[1])
        assert out.dtype == self.word.dtype and out.is_contiguous()
        reference = self.reference()
        assert max_error(out, reference) <= error_bound(self.eager(), reference)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def embeddings(
    total: int,
    N: int,
    *,
    dtype: torch.dtype = torch.float32,
    vector_dtype: torch.dtype | None = None,
    ids_dtype: torch.dtype = torch.int64,
    row_stride: int | None = None,
) -> Embeddings:
    """Tables of 50, 20 and 2 rows; the first and the last row of each are in use."""

    def ids(n_rows: int) -> Tensor:
        drawn = torch.randint(n_rows, (total,), dtype=ids_dtype, device=DEVICE)
        drawn[:1], drawn[1:2] = 0, n_rows - 1
        return drawn

    def table(n_rows: int) -> Tensor:
        return surrounded_by_nan(random(n_rows, N, dtype=dtype), row_stride)

    vector_dtype = vector_dtype or dtype
    return Embeddings(
        input_ids=ids(50),
        position_ids=ids(20),
        token_type_ids=ids(2),
        word=table(50),
        position=table(20),
        token_type=table(2),
        weight=random(N, dtype=vector_dtype),
        bias=random(N, dtype=vector_dtype),
    )


# A width of each kind: no variance, not aligned, aligned to 8 alone, the usual ones, several warps
# to a row, the largest.
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("N", [1, 7, 127, 312, 384, 768, 1000, 1024, 2560, 8192], ids="N{}".format)
def test_widths(kernels, N, dtype):
    total = 33 if N <= 128 else 17 if N <= 1024 else 5
    embeddings(total, N, dtype=dtype).check(kernels)


# No token, one token, a program that is not full, several programs and a rest.
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=dtype_name)
@pytest.mark.parametrize("total", [0, 1, 5, 33], ids="T{}".format)
@pytest.mark.parametrize("N", [128, 384, 1024], ids="N{}".format)
def test_tokens(kernels, total, N, ids_dtype):
    case = embeddings(total, N, dtype=torch.float16, ids_dtype=ids_dtype)
    if total == 0:
        assert kernels.embed_layer_norm(**vars(case), eps=EPS).shape == (0, N)
        return
    case.check(kernels)


def test_many_tokens_of_a_block(kernels):
    """Of rows so wide few blocks are resident, and each goes on to a third token and further."""
    embeddings(9, 8192, dtype=torch.float16).check(kernels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_half_tables_with_float32_vectors(kernels, dtype):
    embeddings(17, 384, dtype=dtype, vector_dtype=torch.float32).check(kernels)


# Strides that are a multiple of 16, of 8 alone, of nothing.
@pytest.mark.parametrize("row_stride", [400, 392, 385], ids=str)
def test_strided_tables(kernels, row_stride):
    case = embeddings(17, 384, dtype=torch.float16, row_stride=row_stride)
    assert case.word.stride() == (row_stride, 1)
    case.check(kernels)


def test_tables_of_different_strides(kernels):
    case = embeddings(17, 384, dtype=torch.float16)
    case.position = surrounded_by_nan(random(20, 384, dtype=torch.float16), 393)
    case.check(kernels)


@pytest.mark.parametrize("absent", ["position", "token_type", "both"])
def test_absent_tables(kernels, absent):
    case = embeddings(17, 384)
    if absent in ("position", "both"):
        case.position = case.position_ids = None
    if absent in ("token_type", "both"):
        case.token_type = case.token_type_ids = None
    case.check(kernels)


@pytest.mark.parametrize("absent", [("bias",), ("weight",), ("weight", "bias")], ids="-".join)
def test_absent_vectors(kernels, absent):
    case = embeddings(17, 384)
    for name in absent:
        setattr(case, name, None)
    case.check(kernels)


# -100 is the label that padding gets; 2**40 rows away lies no memory at all, and cut to 32 bits it
# would be a harmless 0.
BAD_IDS = [(torch.int32, bad) for bad in (-1, -100, "rows", 2**31 - 1)]
BAD_IDS += [(torch.int64, bad) for bad in (-1, -100, "rows", 2**31 - 1, 2**40)]


@pytest.mark.parametrize(
    ("ids_dtype", "bad_id"), BAD_IDS, ids=[f"{dtype_name(d)}-{bad}" for d, bad in BAD_IDS]
)
@pytest.mark.parametrize("table", ["input", "position", "token_type"])
def test_ids_out_of_range(kernels, table, bad_id, ids_dtype):
    case = embeddings(9, 384, dtype=torch.float16, ids_dtype=ids_dtype)
    name = "word" if table == "input" else table
    rows = getattr(case, name).shape[0]
    # Numbers around the table: were they read, the row would not be NaN.
    setattr(case, name, random(100 + rows + 1, 384, dtype=torch.float16)[100:-1])
    expected = case.run(kernels)
    getattr(case, f"{table}_ids")[4] = rows if bad_id == "rows" else bad_id
    out = case.run(kernels)
    assert out[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(out[others], expected[others])


def test_id_out_of_range_is_nan_without_vectors(kernels):
    case = embeddings(5, 384)
    case.weight = case.bias = None
    case.input_ids[2] = 50
    assert torch.equal(case.run(kernels).isnan().all(1).cpu(), torch.arange(5) == 2)


# Row 2 of the table begins beyond what 32 bits can count.
@pytest.mark.large_memory
def test_table_beyond_int32(kernels):
    N, stride = 64, 2**30 + 8
    try:
        buffer = torch.empty(2 * stride + N, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no room for rows far apart: {error}")
    case = embeddings(9, N, dtype=torch.float16, ids_dtype=torch.int32)
    case.word = buffer.as_strided((3, N), (stride, 1)).copy_(random(3, N))
    case.input_ids = torch.tensor([0, 1, 2, 2, 1, 0, 2, 1, 0], dtype=torch.int32, device=DEVICE)
    case.check(kernels)
