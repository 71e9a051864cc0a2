"""LayerNorm of a sum, the step after each half of an encoder layer.

    sum = x + x_bias + residual
    out = LayerNorm(sum) * weight + bias

    x, residual, out, sum   (M, N), fp16, bf16 or fp32
    the vectors             (N,), of any of these types

x is what a linear layer gave without its bias, residual what went into that half. One pass over
memory: each element of x and residual is read once, each of out written once, 6 bytes an element in
half precision. At about 10 floating point operations for these bytes memory bandwidth is the bound.

An encoder that normalises ahead of each half goes on adding to the sum, which is then stored too,
for 2 bytes more. What is normalised is the sum before it was rounded for that.

An absent operand is None; Triton compiles the kernel without it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from encoder_fast.kernels.integers import ceil_div
from encoder_fast.kernels.row_norm import (
    address,
    aligned,
    layer_norm_row,
    piece_columns,
    row_align,
    tile_for,
)


@triton.jit
def store_rows(
    p_rows, b_pieces, o_m, m_m, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store the pieces of contiguous rows, in the type of what is stored to."""
    for i_piece in tl.static_range(len(b_pieces)):
        o_n = piece_columns(i_piece, BLOCK_M, BLOCK_N)
        b_row = b_pieces[i_piece].to(p_rows.dtype.element_ty)
        tl.store(p_rows + o_m * N + o_n, b_row, mask=m_m & (o_n < N))


# M is the number of tokens and changes with each batch: specialised on, its divisibility by 16
# would cost a second compilation and gain nothing.
@triton.jit(do_not_specialize=["M"])
def add_layer_norm_kernel(
    p_x,
    p_x_bias,
    p_residual,
    p_weight,
    p_bias,
    p_out,
    p_sum,
    stride_x_row,
    stride_residual_row,
    M,
    eps,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_m = o_m < M
    p_x += o_m * aligned(stride_x_row, ROW_ALIGN)
    if p_residual is not None:
        p_residual += o_m * aligned(stride_residual_row, ROW_ALIGN)

    b_sum = ()
    for i_piece in tl.static_range(triton.cdiv(N, BLOCK_N)):
        o_n = piece_columns(i_piece, BLOCK_M, BLOCK_N)
        mask = m_m & (o_n < N)
        b_h = tl.load(p_x + o_n, mask=mask, other=0.0).to(tl.float32)
        if p_residual is not None:
            b_h += tl.load(p_residual + o_n, mask=mask, other=0.0).to(tl.float32)
        # Last, for it comes out of the cache: ptxas then issues the loads of x and residual, which
        # are far away, for all pieces together.
        if p_x_bias is not None:
            b_h += tl.load(p_x_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)
        b_sum = b_sum + (b_h,)

    # Apart from the loads above, none of which would be issued ahead of a store.
    if p_sum is not None:
        store_rows(p_sum, b_sum, o_m, m_m, N, BLOCK_M, BLOCK_N)

    b_y = layer_norm_row(b_sum, p_weight, p_bias, eps, N, BLOCK_M, BLOCK_N)

    store_rows(p_out, b_y, o_m, m_m, N, BLOCK_M, BLOCK_N)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    x_bias: torch.Tensor | None = None,
    sum_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm(x + x_bias + residual) * weight + bias, as a new contiguous (M, N) tensor.

    x and residual may have any row stride, their last stride is 1. None leaves an operand out.
    sum_out, contiguous and of the type and shape of x, is overwritten with x + x_bias + residual.
    """
    M, N = x.shape
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0:
        return out
    stride_x_row = x.stride(0)
    stride_residual_row = 0 if residual is None else residual.stride(0)
    itemsize = x.element_size()
    first_rows = address(x, itemsize), address(residual, itemsize)
    align = row_align(itemsize, stride_x_row, stride_residual_row, N, *first_rows)
    tile = tile_for("add_layer_norm", N, itemsize, align, x.device)
    with torch.cuda.device_of(x):
        add_layer_norm_kernel[(ceil_div(M, tile.rows),)](
            x,
            x_bias,
            residual,
            weight,
            bias,
            out,
            sum_out,
            stride_x_row,
            stride_residual_row,
            M,
            eps,
            N=N,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.block_n(itemsize),
            ROW_ALIGN=align,
            num_warps=tile.num_warps,
        )
    return out
