"""From texts to rows to results: tokenised once in a second thread, batched by tokens, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from encoder_fast.text.background import one_ahead
from encoder_fast.text.batching import TokenBudget
from encoder_fast.text.chunking import (
    LONG_TEXT,
    TextTooLongError,
    Window,
    longest_first,
    truncated,
    windows,
)
from encoder_fast.text.progress import Progress
from encoder_fast.text.texts import blocks
from encoder_fast.text.tokenising import Row, Template, Tokeniser, Tokens

Compute = Callable[[Sequence[Row]], Iterable[Tensor]]
"""From the rows of a batch to a result for each."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of texts before they reach the model.

    Attributes:
        long_text: ``truncate``, ``chunk`` or ``error``.
        prompt: put in front of each text, and of each window of a long one.
        query: a first text's tokens that each row has before its own, for cross-encoders.
        detail: whether the place of each token in its text is needed.
        block_size: how many texts are held and sorted at a time; begins small and grows where
            ``None``.
    """

    long_text: str = "truncate"
    prompt: str = ""
    query: np.ndarray | None = None
    detail: bool = False
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.long_text not in LONG_TEXT:
            raise ValueError(f"long_text must be one of {LONG_TEXT}, got {self.long_text!r}")


@dataclass(frozen=True, slots=True)
class Block:
    """Some texts that follow one another, as rows for the model.

    Attributes:
        texts: as given, made encodable.
        tokens: of each text; a prompt's are left out where ``Plan.detail`` is set.
        windows: at least one for each text, in the order of the texts.
        rows: one for each window.
        cut: how many texts were cut.
    """

    texts: list[str]
    tokens: list[Tokens]
    windows: list[Window]
    rows: list[Row]
    cut: int


class Pipeline:
    """All between the texts and the model that does not depend on what is computed.

    Attributes:
        tokens, texts, cut: what has run so far: tokens with special ones, texts, and how many of
            these were cut.
    """

    def __init__(self, tokeniser: Tokeniser, max_length: int, budget: TokenBudget) -> None:
        self.tokeniser = tokeniser
        self.max_length = max_length
        self.budget = budget
        self.single = tokeniser.template(1)
        self.texts = self.tokens = self.cut = 0
        if max_length <= self.single.size:
            raise ValueError(
                f"inputs of {max_length} tokens leave no room beside {self.single.size} special "
                "tokens"
            )

    def run(
        self, texts: Iterable[str], plan: Plan, compute: Compute, *, show_progress: bool = False
    ) -> Iterator[tuple[Block, list[Tensor]]]:
        """Run all texts, a block at a time and in order; no more than two blocks are held.

        Yields:
            Each block, and the model's result for each of its rows.
        """
        template = self.single if plan.query is None else self.tokeniser.template(2)

        def prepare(block: tuple[int, list[str]]) -> Block:
            return self._prepare(*block, plan, template)

        with (
            Progress(texts, show_progress) as progress,
            closing(one_ahead(_numbered(blocks(texts, plan.block_size)), prepare)) as prepared,
        ):
            for block in prepared:
                results = self._compute(block, compute, progress)
                self.texts += len(block.texts)
                self.cut += block.cut
                yield block, results

    def _compute(self, block: Block, compute: Compute, progress: Progress) -> list[Tensor]:
        lengths = np.array([len(row.ids) for row in block.rows], dtype=np.int64)
        # a text of many windows counts with its first
        is_first = np.diff([window.text for window in block.windows], prepend=-1) != 0
        results: dict[int, Tensor] = {}
        for numbers, batch in self.budget.run(
            lengths, lambda numbers: compute([block.rows[number] for number in numbers])
        ):
            results.update(zip(numbers.tolist(), batch, strict=True))
            tokens = int(lengths[numbers].sum())
            self.tokens += tokens
            progress.update(int(is_first[numbers].sum()), tokens)
        return [results[number] for number in range(len(block.rows))]

    def _prepare(self, first: int, texts: list[str], plan: Plan, template: Template) -> Block:
        # a prompt that each window repeats has to be told from the text
        detail = plan.detail or (plan.prompt != "" and plan.long_text == "chunk")
        if detail and not self.tokeniser.has_offsets:
            raise ValueError(
                "this needs the place of each token, which a slow (pure Python) tokenizer "
                "does not tell"
            )
        every = self.tokeniser.tokens([plan.prompt + text for text in texts], detail=detail)
        block = Block(texts, [], [], [], 0)
        cut = 0
        for number, tokens in enumerate(every):
            head = tokens.ids[:0]
            if detail and plan.prompt:
                head, tokens = _split(tokens, len(plan.prompt))
            head, planned = self._plan(first, number, head, len(tokens.ids), plan, template)
            cut += planned[-1].stop - planned[0].start < len(tokens.ids) or (
                plan.query is not None and len(head) < len(plan.query)
            )
            block.tokens.append(tokens)
            block.windows.extend(planned)
            for window in planned:
                ids = tokens.ids[window.start : window.stop]
                parts = (np.concatenate([head, ids]),) if plan.query is None else (head, ids)
                block.rows.append(template.row(*parts))
        return replace(block, cut=cut)

    def _plan(
        self, first: int, number: int, head: np.ndarray, count: int, plan: Plan, template: Template
    ) -> tuple[np.ndarray, list[Window]]:
        """The windows of one text of ``count`` tokens, and what stands before each."""
        room = self.max_length - template.size
        if plan.query is not None:
            head = plan.query
            if plan.long_text == "truncate":
                head = head[: longest_first(len(head), count, room)]
        size = room - len(head)
        if size < min(count, 1):
            raise ValueError(
                f"a prompt or query of {len(head)} tokens leaves no room for texts in inputs of "
                f"{self.max_length}"
            )
        if plan.long_text == "chunk":
            return head, windows(number, count, size)
        if plan.long_text == "error" and count > size:
            raise TextTooLongError(first + number, count, size)
        return head, [truncated(number, count, size, self.tokeniser.truncation_side)]


def _numbered(parts: Iterable[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Each block with the index of its first text."""
    first = 0
    for part in parts:
        yield first, part
        first += len(part)


def _split(tokens: Tokens, prompt: int) -> tuple[np.ndarray, Tokens]:
    """The ids of a prompt of ``prompt`` characters, and the tokens of the text after it."""
    assert tokens.offsets is not None
    inside = int(np.searchsorted(tokens.offsets[:, 1], prompt, side="right"))
    offsets = np.maximum(tokens.offsets[inside:] - prompt, 0)
    return tokens.ids[:inside], Tokens(tokens.ids[inside:], offsets)
