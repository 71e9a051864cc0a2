"""Reading a padding mask: how many tokens there are, and where.

    lengths[b] = number of s with mask[b, s] != 0
    cu_seqlens = exclusive prefix sum of lengths
    indices    = the b * S + s with mask[b, s] != 0, in order

    mask        (B, S), of any integer, floating-point or boolean type
    input_ids   (B, S), int64 or int32
    cu_seqlens  (B + 1,), int32
    indices     (total + onlookers,), int64

Two kernels with the host between them, which has to know how many tokens there are. The first reads
each value of the mask and each token's id once, 8 bytes each in what tokenizers give; the second
reads the mask again, out of the L2 cache, and writes 8 bytes a token. Neither amount is worth
counting beside a forward: what these kernels save is the host's time for some thirty launches. See
docs/kernels/pack_mask.md.

Sums over rows are integer atomics, so their order does not show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from encoder_fast.kernels.integers import ceil_div

# Rows and columns of a program, 8 elements for each of 128 threads.
BLOCK_B, BLOCK_S, NUM_WARPS = 4, 256, 4

# Rows whose lengths a program adds up at a time to find where its own begin.
BLOCK_BEFORE = 1024

# The places in the vector of facts, in the order in which MaskFacts has them.
TOTAL = tl.constexpr(0)
LONGEST = tl.constexpr(1)
HEADLESS = tl.constexpr(2)
GAPS = tl.constexpr(3)
OTHER_VALUES = tl.constexpr(4)
OUTSIDE = tl.constexpr(5)


@triton.jit
def any_of(b_flags):
    return tl.max(tl.max(b_flags.to(tl.int32), axis=1), axis=0) != 0


@triton.jit(do_not_specialize=["B", "S", "stride_mask_row", "stride_ids_row", "vocab_size"])
def count_tokens_kernel(
    p_mask,
    p_ids,
    p_facts,
    p_lengths,
    p_headless,
    B,
    S,
    stride_mask_row,
    stride_ids_row,
    vocab_size,
    ONLOOKERS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    m_b = o_b < B
    p_mask += o_b * stride_mask_row
    if p_ids is not None:
        p_ids += o_b * stride_ids_row

    b_count = tl.zeros((BLOCK_B, BLOCK_S), tl.int32)
    b_first = tl.zeros((BLOCK_B, BLOCK_S), tl.int32) + S
    b_last = tl.zeros((BLOCK_B, BLOCK_S), tl.int32) - 1
    b_other = tl.zeros((BLOCK_B, BLOCK_S), tl.int1)
    b_outside = tl.zeros((BLOCK_B, BLOCK_S), tl.int1)
    for i_s in range(0, S, BLOCK_S):
        o_s = i_s + tl.arange(0, BLOCK_S)[None, :]
        o_col = o_s.to(tl.int64)
        b_value = tl.load(p_mask + o_col, mask=m_b & (o_s < S), other=0)
        if p_mask.dtype.element_ty == tl.bfloat16:
            # The interpreter of Triton 3.9 compares its bits, and so takes -0.0 for a token.
            b_value = b_value.to(tl.float32)
        # NaN counts as a token here and is refused for its value, as PyTorch's comparisons have it.
        b_valid = b_value != 0
        b_count += b_valid.to(tl.int32)
        b_first = tl.minimum(b_first, tl.where(b_valid, o_s, S))
        b_last = tl.maximum(b_last, tl.where(b_valid, o_s, -1))
        b_other |= b_valid & (b_value != 1)
        if p_ids is not None:
            b_id = tl.load(p_ids + o_col, mask=b_valid, other=0)
            b_outside |= b_valid & ((b_id < 0) | (b_id >= vocab_size))

    b_length = tl.sum(b_count, axis=1, keep_dims=True)
    b_first = tl.min(b_first, axis=1, keep_dims=True)
    b_last = tl.max(b_last, axis=1, keep_dims=True)
    b_headless = (b_length > 0) & (b_first > 0)
    # More columns from the first token to the last than there are tokens.
    b_gaps = b_last - b_first >= b_length
    if p_ids is not None and ONLOOKERS:
        b_id = tl.load(p_ids, mask=b_headless, other=0)
        b_outside |= b_headless & ((b_id < 0) | (b_id >= vocab_size))

    tl.store(p_lengths + o_b, b_length, mask=m_b)
    tl.store(p_headless + o_b, b_headless, mask=m_b)
    tl.atomic_add(p_facts + TOTAL, tl.sum(b_length).to(tl.int64), sem="relaxed")
    tl.atomic_max(p_facts + LONGEST, tl.max(b_length).to(tl.int64), sem="relaxed")
    n_headless = tl.sum(b_headless.to(tl.int64))
    tl.atomic_add(p_facts + HEADLESS, n_headless, mask=n_headless > 0, sem="relaxed")
    # Whoever stores here stores the same.
    tl.store(p_facts + GAPS, 1, mask=any_of(b_gaps))
    tl.store(p_facts + OTHER_VALUES, 1, mask=any_of(b_other))
    if p_ids is not None:
        tl.store(p_facts + OUTSIDE, 1, mask=any_of(b_outside))


@triton.jit
def counted_before(p_counts, i_b, B, BLOCK_B: tl.constexpr, BLOCK_BEFORE: tl.constexpr):
    """(BLOCK_B,): for each row from i_b on, the sum of the counts of all rows before it."""
    b_sum = tl.zeros((BLOCK_BEFORE,), tl.int32)
    for i_before in range(0, i_b, BLOCK_BEFORE):
        o_before = i_before + tl.arange(0, BLOCK_BEFORE)
        b_sum += tl.load(p_counts + o_before, mask=o_before < i_b, other=0).to(tl.int32)
    o_b = i_b + tl.arange(0, BLOCK_B)
    b_own = tl.load(p_counts + o_b, mask=o_b < B, other=0).to(tl.int32)
    return tl.sum(b_sum) + tl.cumsum(b_own, axis=0) - b_own


@triton.jit(do_not_specialize=["B", "S", "stride_mask_row", "total"])
def place_tokens_kernel(
    p_mask,
    p_lengths,
    p_headless,
    p_cu_seqlens,
    p_indices,
    p_onlooker_rows,
    B,
    S,
    stride_mask_row,
    total,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_BEFORE: tl.constexpr,
):
    i_b = tl.program_id(0) * BLOCK_B
    o_b = i_b + tl.arange(0, BLOCK_B)
    o_row = o_b.to(tl.int64)
    m_b = o_b < B

    b_start = counted_before(p_lengths, i_b, B, BLOCK_B, BLOCK_BEFORE)
    # Row B has no token, and begins where all of them end.
    tl.store(p_cu_seqlens + o_b, b_start, mask=o_b <= B)

    p_mask += o_row[:, None] * stride_mask_row
    b_slot = b_start
    for i_s in range(0, S, BLOCK_S):
        o_s = (i_s + tl.arange(0, BLOCK_S)[None, :]).to(tl.int64)
        m_s = m_b[:, None] & (o_s < S)
        b_value = tl.load(p_mask + o_s, mask=m_s, other=0)
        if p_mask.dtype.element_ty == tl.bfloat16:
            b_value = b_value.to(tl.float32)  # as above
        b_valid = b_value != 0
        b_one = b_valid.to(tl.int32)
        o_token = b_slot[:, None] + tl.cumsum(b_one, axis=1) - b_one
        tl.store(p_indices + o_token, o_row[:, None] * S + o_s, mask=b_valid)
        b_slot += tl.sum(b_one, axis=1)

    if p_onlooker_rows is not None:
        b_rank = counted_before(p_headless, i_b, B, BLOCK_B, BLOCK_BEFORE)
        m_onlooker = tl.load(p_headless + o_b, mask=m_b, other=0) != 0
        tl.store(p_onlooker_rows + b_rank, o_row, mask=m_onlooker)
        tl.store(p_indices + total + b_rank, o_row * S, mask=m_onlooker)


def _with_adjacent_columns(x: torch.Tensor) -> torch.Tensor:
    """(B, S) as it is, or else a copy: tokenizers give no other strides."""
    return x if x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)


def count_tokens(
    mask: torch.Tensor,
    input_ids: torch.Tensor | None,
    vocab_size: int,
    onlookers: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a mask with at least one row and one column says, without waiting for it.

    Returns:
        facts: int64 (6,): the tokens, those of the fullest row, the headless rows; and as 0 or 1
            whether there are gaps, values other than 0 and 1, and ids outside [0, vocab_size).
        lengths: int32 (B,), the tokens of each row.
        headless: bool (B,), the rows with a token, but none in column 0.
    """
    B, S = mask.shape
    facts = torch.zeros(6, dtype=torch.int64, device=mask.device)
    lengths = torch.empty(B, dtype=torch.int32, device=mask.device)
    headless = torch.empty(B, dtype=torch.bool, device=mask.device)
    mask = _with_adjacent_columns(mask)
    ids = None if input_ids is None else _with_adjacent_columns(input_ids)
    stride_ids_row = 0 if ids is None else ids.stride(0)
    with torch.cuda.device_of(mask):
        count_tokens_kernel[(ceil_div(B, BLOCK_B),)](
            mask,
            ids,
            facts,
            lengths,
            headless,
            B,
            S,
            mask.stride(0),
            stride_ids_row,
            vocab_size,
            ONLOOKERS=onlookers,
            BLOCK_B=BLOCK_B,
            BLOCK_S=BLOCK_S,
            num_warps=NUM_WARPS,
        )
    return facts, lengths, headless


def place_tokens(
    mask: torch.Tensor,
    lengths: torch.Tensor,
    headless: torch.Tensor,
    total: int,
    onlookers: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Where the tokens of a mask are, and behind them column 0 of `onlookers` headless rows.

    Returns:
        cu_seqlens: int32 (B + 1,).
        indices: int64 (total + onlookers,).
        onlooker_rows: int64 (onlookers,); None where there are to be none.
    """
    B, S = mask.shape
    mask = _with_adjacent_columns(mask)
    cu_seqlens = torch.empty(B + 1, dtype=torch.int32, device=mask.device)
    indices = torch.empty(total + onlookers, dtype=torch.int64, device=mask.device)
    onlooker_rows = None
    if onlookers:
        onlooker_rows = torch.empty(onlookers, dtype=torch.int64, device=mask.device)
    with torch.cuda.device_of(mask):
        # One row more than there are, for the end of cu_seqlens.
        place_tokens_kernel[(ceil_div(B + 1, BLOCK_B),)](
            mask,
            lengths,
            headless,
            cu_seqlens,
            indices,
            onlooker_rows,
            B,
            S,
            mask.stride(0),
            total,
            BLOCK_B=BLOCK_B,
            BLOCK_S=BLOCK_S,
            BLOCK_BEFORE=BLOCK_BEFORE,
            num_warps=NUM_WARPS,
        )
    return cu_seqlens, indices, onlooker_rows
