"""How long the texts of a batch are: the one thing beside the model that decides a speed-up."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

KINDS = ("full", "half", "squad")


@dataclass(frozen=True, slots=True)
class Workload:
    """A batch of ``batch`` texts, padded to ``longest`` tokens.

    Attributes:
        kind: ``full``, every text as long as the batch; ``half``, lengths evenly from short to
            long, so that half the batch is padding; ``squad``, lengths like those of questions with
            their paragraphs.
    """

    kind: str
    batch: int
    longest: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch}x{self.longest}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each text; the same ones each time."""
        if self.kind == "full":
            return (self.longest,) * self.batch
        chance = random.Random(0)
        if self.kind == "half":
            shortest = max(2, self.longest // 32)
            step = (self.longest - shortest) / max(1, self.batch - 1)
            lengths = [shortest + round(i * step) for i in range(self.batch)]
        else:
            lengths = [_like_squad(chance, self.longest) for _ in range(self.batch)]
            lengths[0] = self.longest  # what the batch is padded to
        chance.shuffle(lengths)
        return tuple(lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def padding(self) -> float:
        """The share of the padded batch that is padding."""
        return 1 - self.tokens / (self.batch * self.longest)


def _like_squad(chance: random.Random, longest: int) -> int:
    """A question and a paragraph under BERT's tokens: drawn from a model, not from the data set.

    Log-normal about 165 tokens, and cut at ``longest``, by default 384 there. Less than half of
    such a batch is text.
    """
    scale = longest / 384
    return max(2, min(longest, round(scale * chance.lognormvariate(math.log(165), 0.35))))
