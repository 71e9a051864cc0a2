"""The gate of a gated feed-forward block.

    out = activation(x[:, :N]) * x[:, N:]

    x     (M, 2 * N), fp16, bf16 or fp32, contiguous: what the first linear gives
    out   (M, N)

Each element of x is read once, each of out written once, 6 bytes an element of out in half
precision: memory bandwidth is the bound. As two operations of PyTorch it would be 10 bytes, for the
activated features are written and read once more, and one launch more.

GELU in its tanh form is x * sigmoid(2 * u), which is the same number as 0.5 * x * (1 + tanh(u)).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from encoder_fast.kernels.integers import ceil_div

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")

# 8 elements for each of 128 threads, one access in half precision. Most inner widths are a multiple
# of 128 columns: 1152 and 2624 in ModernBERT.
BLOCK_M, BLOCK_N, NUM_WARPS = 8, 128, 4

RSQRT_2 = tl.constexpr(0.7071067811865476)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def activated(b_x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * b_x * (1.0 + tl.erf(b_x * RSQRT_2))
    if ACTIVATION == "gelu_tanh":
        # The constant stands behind: Triton 3.9's interpreter takes none of this kind in front.
        return b_x * tl.sigmoid((b_x + 0.044715 * b_x * b_x * b_x) * SQRT_8_OVER_PI)
    # As torch does it, NaN stays NaN.
    return tl.where(b_x < 0.0, 0.0, b_x)


@triton.jit(do_not_specialize=["M"])
def gated_kernel(
    p_x,
    p_out,
    M,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (o_m < M) & (o_n < N)
    p_x += o_m * (2 * N) + o_n
    b_features = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    b_gate = tl.load(p_x + N, mask=mask, other=0.0).to(tl.float32)
    b_out = activated(b_features, ACTIVATION) * b_gate
    tl.store(p_out + o_m * N + o_n, b_out.to(p_out.dtype.element_ty), mask=mask)


def gated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(x[:, :N]) * x[:, N:] as a new contiguous (M, N) tensor; x is contiguous."""
    M, N = x.shape[0], x.shape[1] // 2
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0:
        return out
    with torch.cuda.device_of(x):
        gated_kernel[(ceil_div(M, BLOCK_M), ceil_div(N, BLOCK_N))](
            x,
            out,
            M,
            N=N,
            ACTIVATION=activation,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
        )
    return out
