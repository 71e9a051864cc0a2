"""Attention of the onlookers: padding in a first column that somebody reads.

Where a row begins with padding, Hugging Face pools the state of the padding token in column 0. That
token attends to all tokens of its row, as each of them does, but none of them attends to it. So its
state is no part of any sequence: it stands behind the packed tokens, where the attention backends
write zeros, and one query a row is computed here, in plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder_fast.packing import PackedBatch


@dataclass(frozen=True, slots=True)
class Onlookers:
    """What the onlookers of a batch see, the same in every layer.

    Attributes:
        total: the number of tokens, and so where the onlookers begin.
        keys: integers ``(onlookers, max_seqlen)``: the tokens of each one's row.
        is_key: boolean ``(onlookers, 1, 1, max_seqlen)``: where ``keys`` is not filled up.
    """

    total: int
    keys: Tensor
    is_key: Tensor

    @classmethod
    def of(cls, batch: PackedBatch) -> Onlookers | None:
        """Those of a batch that has any. Nothing here waits for the device."""
        if batch.onlooker_rows is None:
            return None
        starts = batch.cu_seqlens[:-1].index_select(0, batch.onlooker_rows).unsqueeze(1)
        lengths = batch.cu_seqlens.diff().index_select(0, batch.onlooker_rows).unsqueeze(1)
        steps = torch.arange(batch.max_seqlen, device=starts.device, dtype=starts.dtype)
        # Filled up with a token of the same row: a weight of 0 would still turn another row's
        # infinite or NaN value into NaN.
        keys = starts + torch.minimum(steps, lengths - 1)
        return cls(batch.total, keys, (steps < lengths)[:, None, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, out: Tensor) -> None:
        """Write the onlookers' context into the end of ``out``; all ``(total, H, D)``."""
        seen = [
            x.index_select(0, self.keys.view(-1)).view(*self.keys.shape, *x.shape[1:])
            for x in (k, v)
        ]
        keys, values = (x.transpose(1, 2) for x in seen)
        queries = q[self.total :].unsqueeze(2)
        context = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=self.is_key, scale=softmax_scale
        )
        out[self.total :].copy_(context.squeeze(2))
