"""The CPU's attention by PyTorch, where the scores of all heads are too many for the cache."""

import pytest
import torch
from berts import DEVICE, DTYPES
from disentangled_oracle import problem
from test_ops import check, cumulative, distance_attention

from encoder_fast.backends import cpu_attention, cpu_disentangled, cpu_kernels
from encoder_fast.ops.attention import attention
from encoder_fast.ops.disentangled_attention import disentangled_attention

HEADS, SIZE = 5, 16

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="other devices have no such groups")


@pytest.mark.parametrize("option", ["plain", "bias"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention(groups: int, dtype: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, kind = (130, 0, 1, 97, 97), DTYPES[dtype]
    monkeypatch.setattr(cpu_kernels, "isa", 0)
    monkeypatch.setattr(cpu_attention, "_SCORES_BYTES", groups * 130 * 130 * kind.itemsize)
    # a processor without bfloat16 would go another way
    monkeypatch.setattr(cpu_attention, "has_onednn", lambda dtype: True)
    seen = []
    original = cpu_attention._by_gemms

    def spy(q: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(q.shape[0])
        return original(q, *rest)

    monkeypatch.setattr(cpu_attention, "_by_gemms", spy)
    qkv = torch.randn(sum(counts), 3, HEADS, SIZE, dtype=kind)
    bias = torch.randn(HEADS, 2 * 40 + 1, dtype=kind) if option == "bias" else None
    output = attention(
        *qkv.unbind(1),
        cumulative(list(counts)),
        max(counts),
        relative_bias=bias,
        backend="cpu",
    )
    assert groups in seen and max(seen) <= HEADS
    for rows in torch.arange(len(qkv)).split(counts):
        if len(rows):
            eager, exact = (
                distance_attention(qkv[rows].to(t), None, bias) for t in (kind, torch.float64)
            )
            check(output[rows], eager, exact)


@pytest.mark.parametrize("terms", ["c2p+p2c", "c2p", "p2c"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_disentangled_attention(dtype: str, terms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_disentangled, "_CACHE_BYTES", 0)
    seen = []
    original = cpu_disentangled._attend

    def spy(q: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(q.shape[0])
        return original(q, *rest)

    monkeypatch.setattr(cpu_disentangled, "_attend", spy)
    one = problem((70, 0, 3, 40), DTYPES[dtype], heads=HEADS, terms=terms)
    output = disentangled_attention(
        *(one.q, one.k, one.v, one.cu_seqlens, one.longest, one.row_of_distance),
        pos_key=one.pos_key,
        pos_query=one.pos_query,
        softmax_scale=one.scale,
        backend="cpu",
    )
    assert seen[:3] == [2, 2, 1]
    one.check(output)
