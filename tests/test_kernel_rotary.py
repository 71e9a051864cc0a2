"""The Triton kernel rotary, against float64."""

from __future__ import annotations

import pytest
import torch
from layer_norm_oracle import DEVICE, DTYPES, dtype_name, error_bound, max_error
from torch import Tensor

from encoder_fast.kernels.rotary import head_tile, rotary
from encoder_fast.ops.rotary import rotary_tables

# The head sizes that attention has; 96 leaves lanes idle.
HEAD_DIMS = (16, 32, 64, 96, 128)

GUARD_ROWS = 5


def turned(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries and keys as a Hugging Face layer turns them, in the dtype that comes in."""
    half = qkv.shape[3] // 2
    cos, sin = (torch.cat([t, t], dim=-1)[:, None, None].to(qkv.dtype) for t in (cos, sin))
    qk = qkv[:, :2]
    crossed = torch.cat([-qk[..., half:], qk[..., :half]], dim=-1)
    return qk * cos + crossed * sin


def check(total: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    values = torch.randn(total, 3, heads, head_dim, device=DEVICE).to(dtype)
    frequencies = 1e4 ** -(torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    positions = torch.randint(0, 8192, (total,), device=DEVICE)
    cos, sin = rotary_tables(positions, frequencies)
    # Not NaN, which stays what it is when it is turned.
    buffer = torch.full((total + GUARD_ROWS, 3, heads, head_dim), 7.0, dtype=dtype)
    buffer = buffer.to(DEVICE)
    qkv = buffer[:total].copy_(values)

    rotary(qkv, cos, sin)

    assert torch.equal(qkv[:, 2], values[:, 2]), "the values stay as they are"
    assert (buffer[total:] == 7).all(), "written beyond the last token"
    if total:
        exact = turned(values.double(), cos, sin)
        assert max_error(qkv[:, :2], exact) <= error_bound(turned(values, cos, sin), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids="D{}".format)
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    check(7, 3, head_dim, dtype)


# No token, one, and programs that end within a token's heads.
@pytest.mark.parametrize("total", [0, 1, 5, 33], ids="T{}".format)
@pytest.mark.parametrize("heads", [1, 2, 12], ids="H{}".format)
def test_tokens_and_heads(heads: int, total: int) -> None:
    check(total, heads, 64, torch.float16)


def test_a_tile_gives_each_thread_as_much() -> None:
    for head_dim in HEAD_DIMS:
        tile = head_tile(head_dim)
        assert tile.block_d >= head_dim // 2
        assert tile.rows * tile.block_d == 8 * 32 * tile.num_warps
