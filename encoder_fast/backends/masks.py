"""Reading a padding mask in plain PyTorch, on any device: some thirty operations, the oracle of the
kernels that do it in two."""

from __future__ import annotations

import torch
from torch import Tensor


def count_tokens(
    mask: Tensor, input_ids: Tensor | None, vocab_size: int, onlookers: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What a ``(B, S)`` mask with at least one value says, without waiting for it.

    Returns:
        facts: int64 ``(6,)``: the tokens, those of the fullest row, the headless rows; and as 0 or
            1 whether there are gaps, values other than 0 and 1, and ids outside
            ``[0, vocab_size)``.
        lengths: integers ``(B,)``, the tokens of each row.
        headless: boolean ``(B,)``, the rows with a token, but none in column 0.
    """
    valid = mask != 0
    lengths = valid.sum(dim=1)
    headless = valid.any(dim=1) & ~valid[:, 0]
    # A row's ones are one run unless a one follows a zero more than once.
    runs = valid[:, 0] + (valid[:, 1:] & ~valid[:, :-1]).sum(dim=1)
    no = lengths.new_zeros(())
    other_values = no if mask.dtype == torch.bool else (valid & (mask != 1)).any().long()
    outside = no
    if input_ids is not None:
        wrong = (input_ids < 0) | (input_ids >= vocab_size)
        outside = (valid & wrong).any().long()
        if onlookers:
            outside |= (headless & wrong[:, 0]).any()
    gaps = (runs > 1).any().long()
    parts = [lengths.sum(), lengths.max(), headless.sum(), gaps, other_values, outside]
    return torch.stack(parts), lengths, headless


def place_tokens(
    mask: Tensor, lengths: Tensor, headless: Tensor, total: int, onlookers: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where the tokens of a mask are, and behind them column 0 of the ``onlookers`` headless rows.

    Returns:
        cu_seqlens: int32 ``(B + 1,)``.
        indices: int64 ``(total + onlookers,)``.
        onlooker_rows: int64 ``(onlookers,)``; ``None`` where there are to be none.
    """
    batch_size, padded_length = mask.shape
    cu_seqlens = torch.zeros(batch_size + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(lengths, dim=0, out=cu_seqlens[1:])
    indices = _places_of_ones((mask != 0).reshape(-1), total)
    if not onlookers:
        return cu_seqlens, indices, None
    rows = _places_of_ones(headless, onlookers)
    return cu_seqlens, torch.cat([indices, rows * padded_length]), rows


def _places_of_ones(flags: Tensor, count: int) -> Tensor:
    """int64 ``(count,)``: where a boolean vector of that many ones has them, in order."""
    # The slot of each one is the count of ones before it. Zeros are sent to one slot past the end.
    # Unlike nonzero, this needs no host wait for the size.
    slots = torch.where(flags, flags.cumsum(0) - 1, count)
    places = torch.arange(flags.numel(), device=flags.device)
    return places.new_zeros(count + 1).scatter_(0, slots, places)[:count]
