"""The disentangled attention op on every backend at hand: numbers, errors, torch.compile."""

from dataclasses import replace

import pytest
import torch
from berts import DEVICE, DTYPES
from disentangled_oracle import Problem, problem, spread
from test_ops import BACKENDS as ALL_BACKENDS
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from encoder_fast.ops.disentangled_attention import disentangled_attention, make_row_of_distance

# The CUDA kernels have no float32; tests/test_kernel_disentangled.py has them.
BACKENDS = [name for name in ALL_BACKENDS if "cuda" not in name]

LENGTHS = {
    "one": (1,),
    "mixed": (15, 16, 17, 0, 33, 64, 65, 1),  # around tiles of 16, 32 and 64
    "equal-neighbours": (7, 7, 7, 3, 7, 7),
    "empty-rows": (0, 5, 0, 0),
    "long": (129, 40),
    "no-token": (0,),
    "no-row": (),
}
TERMS = ("c2p+p2c", "c2p", "p2c", "none")


def run(one: Problem, backend: str) -> torch.Tensor:
    return disentangled_attention(
        *(one.q, one.k, one.v, one.cu_seqlens, one.longest, one.row_of_distance),
        pos_key=one.pos_key,
        pos_query=one.pos_query,
        softmax_scale=one.scale,
        backend=backend,
    )


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend: str, dtype: str, lengths: tuple[int, ...]) -> None:
    one = problem(lengths, DTYPES[dtype], heads=1, device=DEVICE)
    one.check(run(one, backend))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("buckets", (24, 0), ids=("log", "clamped"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_terms(backend: str, buckets: int, terms: str) -> None:
    one = problem((40, 3, 33), torch.float32, terms=terms, buckets=buckets, device=DEVICE)
    one.check(run(one, backend))
    spread_out = spread(one)
    spread_out.check(run(spread_out, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_longer_than_a_block_of_the_cache(backend: str) -> None:
    # Several blocks of rows in the backends that cut long sequences.
    one = problem(
        *((600,), torch.float32), heads=1, span=64, buckets=64, max_distance=256, device=DEVICE
    )
    one.check(run(one, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_scale(backend: str) -> None:
    for terms, count in (("c2p+p2c", 3), ("p2c", 2)):
        one = problem((9,), torch.float32, terms=terms, device=DEVICE)
        one = replace(one, scale=(32 * count) ** -0.5)
        out = disentangled_attention(
            *(one.q, one.k, one.v, one.cu_seqlens, 9, one.row_of_distance),
            pos_key=one.pos_key,
            pos_query=one.pos_query,
            backend=backend,
        )
        one.check(out)


# (buckets, where the logarithm ends): DeBERTa-v3's, small ones, an odd one, one step to a bucket.
@pytest.mark.parametrize(("buckets", "end"), ((256, 512), (16, 40), (7, 30), (6, 20), (2, 9)))
def test_rows_are_the_originals_buckets(buckets: int, end: int) -> None:
    table = make_row_of_distance(buckets, buckets, end, torch.device(DEVICE))
    reach = len(table) // 2
    distance = torch.arange(-3 * reach, 3 * reach + 1, device=DEVICE)
    bucket = make_log_bucket_position(distance, buckets, end).long()
    expected = (bucket + buckets).clamp(0, 2 * buckets - 1)
    assert torch.equal(table[distance.clamp(-reach, reach) + reach].long(), expected)


def test_rows_without_buckets_are_distances() -> None:
    table = make_row_of_distance(3, 0, 512, torch.device(DEVICE))
    assert table.tolist() == [0, 1, 2, 3, 4, 5, 5]


def test_errors() -> None:
    one = problem((5, 4), torch.float32, device=DEVICE)
    wrong = {
        "one shape": {"k": one.k[1:]},
        "pos_key is torch.float16": {"pos_key": one.pos_key.half()},
        "pos_query must be": {"pos_query": one.pos_query[:, :1]},
        "pos_key's last stride": {"pos_key": one.pos_key.mT.contiguous().mT},
        "row_of_distance must be int32": {"row_of_distance": one.row_of_distance.long()},
        "2R \\+ 1": {"row_of_distance": one.row_of_distance[1:]},
        "row_of_distance must be contiguous": {
            "row_of_distance": one.row_of_distance.repeat_interleave(2)[::2]
        },
        "softmax_scale": {"scale": 0.0},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            run(replace(one, **change), "auto")
    with pytest.raises(ValueError, match="max_seqlen"):
        disentangled_attention(one.q, one.k, one.v, one.cu_seqlens, -1, one.row_of_distance)
    table = one.pos_key.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        run(replace(one, pos_key=table), "auto")


def test_compiles_without_a_graph_break() -> None:
    one = problem((6, 9), torch.float32, device=DEVICE)
    compiled = torch.compile(
        lambda q, k, v: run(replace(one, q=q, k=k, v=v), "reference"),
        backend="aot_eager",
        fullgraph=True,
    )
    one.check(compiled(one.q, one.k, one.v))
