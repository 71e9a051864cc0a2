"""What the model says of each token of a text, put together from the text's windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from encoder_fast.text.pipeline import Block
from encoder_fast.text.tokenising import Tokens


@dataclass(frozen=True, slots=True)
class TokenEmbeddings:
    """A vector for each token of a text.

    Attributes:
        tokens: as the vocabulary has them, special tokens included.
        vectors: float32 ``(n, D)``.
    """

    tokens: list[str]
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class PerToken:
    """The results for one text's tokens.

    Attributes:
        text: the text.
        tokens: those that the model read; fewer than the text has where it was cut.
        content: ``(n, K)``, each from the window where the token has most context around it.
        before, after: the results for the special tokens at both ends.
        special_ids: the ids of these, before and after.
    """

    text: str
    tokens: Tokens
    content: Tensor
    before: Tensor
    after: Tensor
    special_ids: tuple[np.ndarray, np.ndarray]


def per_token(block: Block, results: list[Tensor], lead: int) -> Iterator[PerToken]:
    """Each text of a block; ``lead`` special tokens stand before a window's own."""
    whole = zip(block.windows, block.rows, results, strict=True)
    for text, group in groupby(whole, key=lambda item: item[0].text):
        windows, rows, values = zip(*group, strict=True)
        content = [
            value[lead + window.own_start - window.start : lead + window.own_stop - window.start]
            for window, value in zip(windows, values, strict=True)
        ]
        read = slice(windows[0].own_start, windows[-1].own_stop)
        end = lead + windows[-1].stop - windows[-1].start
        tokens = block.tokens[text]
        yield PerToken(
            text=block.texts[text],
            tokens=Tokens(
                tokens.ids[read],
                None if tokens.offsets is None else tokens.offsets[read],
            ),
            content=torch.cat(content),
            before=values[0][:lead],
            after=values[-1][end:],
            special_ids=(rows[0].ids[:lead], rows[-1].ids[end:]),
        )
