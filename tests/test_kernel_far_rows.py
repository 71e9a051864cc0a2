"""The last rows of contiguous operands of more than 2^31 elements, in Triton kernels.

The last program of a launch runs here and no other, and pages that nobody touches take no memory.
"""

from __future__ import annotations

import pytest
import torch
from attention_oracle import DEVICE
from torch import Tensor

from encoder_fast.kernels.gated import gated
from encoder_fast.kernels.pack_mask import count_tokens, place_tokens
from encoder_fast.kernels.rotary import rotary

if DEVICE == "cuda":
    pytest.skip("Triton interprets nothing where there is a GPU", allow_module_level=True)

from triton_interleaving import last_program_alone

pytestmark = pytest.mark.large_memory


def untouched(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    try:
        x = torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"no room for rows that far: {error}")
    return x


def test_gated() -> None:
    x = untouched(2**18 + 8, 2 * 4096)
    x[-1] = torch.randn(2 * 4096)
    with last_program_alone():
        out = gated(x, "gelu")
    # The last program has the last 128 columns.
    assert torch.equal(out[-1:, -128:], gated(x[-1:], "gelu")[:, -128:])


def test_rotary() -> None:
    heads, head_dim = 8, 128
    total = 2**31 // (3 * heads * head_dim) + 8
    qkv = untouched(total, 3, heads, head_dim)
    cos, sin = (untouched(total, head_dim // 2, dtype=torch.float32) for _ in range(2))
    last = slice(total - 1, total)
    for x in (qkv, cos, sin):
        x[last] = torch.randn(x[last].shape)
    expected = qkv[last].clone()
    rotary(expected, cos[last], sin[last])
    with last_program_alone():
        rotary(qkv, cos, sin)
    # The last program has the 16 heads of the last token.
    assert torch.equal(qkv[last], expected)


def test_pack_mask() -> None:
    # The last program counts the last three rows, and places them and the end of cu_seqlens.
    rows, columns = 2**17 + 3, 2**14
    mask = untouched(rows, columns, dtype=torch.bool)
    mask[-3:] = False
    mask[-1, 5] = True
    with last_program_alone():
        facts, lengths, headless = count_tokens(mask, None, 0, True)
    assert facts[:3].tolist() == [1, 1, 1]
    assert lengths[-3:].tolist() == [0, 0, 1] and headless[-3:].tolist() == [False, False, True]
    lengths[:-3], headless[:-3] = 0, False
    with last_program_alone():
        cu_seqlens, indices, onlooker_rows = place_tokens(mask, lengths, headless, 1, 1)
    begin = (rows - 1) * columns
    assert cu_seqlens[-4:].tolist() == [0, 0, 0, 1]
    assert indices.tolist() == [begin + 5, begin]
    assert onlooker_rows is not None and onlooker_rows.tolist() == [rows - 1]
