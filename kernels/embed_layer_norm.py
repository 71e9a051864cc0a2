"""The embedding stage of an encoder: gather of three tables, sum, LayerNorm.

    out = LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids])
          * weight + bias

    ids           (total,), int64 or int32, contiguous
    word          (vocabulary, N); position, token_type likewise, fp16, bf16 or fp32
    weight, bias  (N,), of any of these types
    out           (total, N), in the type of word

In half precision a row costs 2 * N bytes of the word table and 2 * N bytes of output; the position
and token type tables are small enough to come out of the L2 cache. Memory is the bound, and ahead
of it latency: the gather can start only when the ids are there.

Eager PyTorch rounds the sum to the model's type after each addition. Here the additions, in the
same order, are float32, and there is one rounding, at the store.

**Ids out of range.** An id below 0 or beyond its table reads nothing, and its row of the output
becomes NaN. An error is not possible: the ids are known on the GPU alone, and to raise, the host
would have to wait for them. NaN can't be mistaken for a result, and it stays inside its sequence.

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
def locate_rows(p_ids, o_m, m_m, n_rows, stride_row, ROW_ALIGN: tl.constexpr):
    """Offsets of the table rows that the ids name, and which of the ids name one.

    o_m and m_m are (BLOCK_M,), what is returned is (BLOCK_M, 1): loaded as a column, each id would
    be loaded eight times by each thread.
    """
    b_id = tl.load(p_ids + o_m, mask=m_m, other=0).to(tl.int64)[:, None]
    return b_id * aligned(stride_row, ROW_ALIGN), (b_id >= 0) & (b_id < n_rows)


@triton.jit(do_not_specialize=["total"])
def embed_layer_norm_kernel(
    p_input_ids,
    p_position_ids,
    p_token_type_ids,
    p_word,
    p_position,
    p_token_type,
    p_weight,
    p_bias,
    p_out,
    stride_word_row,
    stride_position_row,
    stride_token_type_row,
    n_word,
    n_position,
    n_token_type,
    total,
    eps,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < total

    o_word, m_word = locate_rows(p_input_ids, o_m, m_m, n_word, stride_word_row, ROW_ALIGN)
    m_known = m_word
    if p_token_type is not None:
        o_token_type, m_token_type = locate_rows(
            p_token_type_ids, o_m, m_m, n_token_type, stride_token_type_row, ROW_ALIGN
        )
        m_known &= m_token_type
    if p_position is not None:
        o_position, m_position = locate_rows(
            p_position_ids, o_m, m_m, n_position, stride_position_row, ROW_ALIGN
        )
        m_known &= m_position

    b_sum = ()
    for i_piece in tl.static_range(triton.cdiv(N, BLOCK_N)):
        o_n = piece_columns(i_piece, BLOCK_M, BLOCK_N)
        mask = m_known & (o_n < N)
        b_h = tl.load(p_word + o_word + o_n, mask=mask, other=0.0).to(tl.float32)
        if p_token_type is not None:
            b_h += tl.load(p_token_type + o_token_type + o_n, mask=mask, other=0.0).to(tl.float32)
        if p_position is not None:
            b_h += tl.load(p_position + o_position + o_n, mask=mask, other=0.0).to(tl.float32)
        b_sum = b_sum + (b_h,)

    # A NaN epsilon makes NaN of the whole row.
    b_eps = tl.where(m_known, eps, float("nan"))
    b_y = layer_norm_row(b_sum, p_weight, p_bias, b_eps, N, BLOCK_M, BLOCK_N)

    for i_piece in tl.static_range(triton.cdiv(N, BLOCK_N)):
        o_n = piece_columns(i_piece, BLOCK_M, BLOCK_N)
        b_out = b_y[i_piece].to(p_out.dtype.element_ty)
        tl.store(p_out + o_m[:, None] * N + o_n, b_out, mask=m_m[:, None] & (o_n < N))


def embed_layer_norm(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor | None,
    token_type: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """LayerNorm of the summed embeddings of each token, as a new contiguous (total, N) tensor.

    Tables may have any row stride, their last stride is 1. Ids of None leave their table out. A row
    with an id that its table does not have is NaN.
    """
    total, N = input_ids.shape[0], word.shape[1]
    out = torch.empty((total, N), dtype=word.dtype, device=word.device)
    if total == 0:
        return out
    itemsize = word.element_size()
    stride_word_row, n_word = word.stride(0), word.shape[0]
    stride_position_row, n_position = _stride_and_rows(position)
    stride_token_type_row, n_token_type = _stride_and_rows(token_type)
    strides = stride_word_row, stride_position_row, stride_token_type_row
    first_rows = (address(table, itemsize) for table in (word, position, token_type))
    align = row_align(itemsize, *strides, N, *first_rows)
    tile = tile_for("embed_layer_norm", N, itemsize, align, word.device)
    with torch.cuda.device_of(word):
        embed_layer_norm_kernel[(ceil_div(total, tile.rows),)](
            input_ids,
            position_ids,
            token_type_ids,
            word,
            position,
            token_type,
            weight,
            bias,
            out,
            stride_word_row,
            stride_position_row,
            stride_token_type_row,
            n_word,
            n_position,
            n_token_type,
            total,
            eps,
            N=N,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.block_n(itemsize),
            ROW_ALIGN=align,
            num_warps=tile.num_warps,
        )
    return out


def _stride_and_rows(table: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if table is None else (table.stride(0), table.shape[0])
