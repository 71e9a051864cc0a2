"""``TextEncoder``: from texts to vectors, labels, entities and rankings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder_fast.text import rerank
from encoder_fast.text.batching import TokenBudget
from encoder_fast.text.classify import Classification, classifications, label_names
from encoder_fast.text.labels import read_labels
from encoder_fast.text.loading import load
from encoder_fast.text.pipeline import Block, Compute, Pipeline, Plan
from encoder_fast.text.reporting import TextReport, warn_caller
from encoder_fast.text.runner import Runner
from encoder_fast.text.settings import Settings, longest_input, positions
from encoder_fast.text.tag import Entity, check_strategy, entities
from encoder_fast.text.texts import check_iterable, encodable
from encoder_fast.text.tokenising import Tokeniser
from encoder_fast.text.tokens import TokenEmbeddings, per_token
from encoder_fast.text.vectors import PRECISIONS, Chunks, Finish, quantise, whole_texts


class TextEncoder:
    """An encoder with its tokenizer, run over any number of texts.

    Texts are tokenised once, ahead of the model; batches are made by tokens and carry no padding;
    results come in the order of the texts. The same text gives the same result whatever else is in
    its batch, but for float noise (``docs/text.md``).

    Attributes:
        model: the model, with its head if it has one; patched in place where it can be.
        tokenizer: the tokenizer as it was given or loaded.
        settings: what the model's files say of its use.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        settings: Settings | None = None,
        *,
        backend: str = "auto",
        cuda_graphs: bool = False,
        max_tokens_per_batch: int | None = None,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.settings = settings or Settings()
        self._runner = Runner(model, backend, cuda_graphs)
        tokeniser = Tokeniser(tokenizer, lower_case=self.settings.lower_case)
        max_length = longest_input(model, tokeniser.max_length, self.settings)
        budget = (
            TokenBudget.automatic(model)
            if max_tokens_per_batch is None
            else TokenBudget(max_tokens_per_batch)
        )
        self._pipeline = Pipeline(tokeniser, max_length, budget)

    @classmethod
    def from_pretrained(
        cls,
        path_or_model: str | os.PathLike[str] | nn.Module,
        tokenizer: Any = None,
        pooling: str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str = "auto",
        max_tokens_per_batch: int | None = None,
        cuda_graphs: bool = False,
    ) -> TextEncoder:
        """Load a model, or take one that is loaded.

        Args:
            path_or_model: a folder or hub name, of sentence-transformers or plain transformers; or
                a Hugging Face model, a ``SentenceTransformer`` or a ``CrossEncoder``, which is
                patched in place.
            tokenizer: a Hugging Face tokenizer or where to load one from; the model's own where
                ``None``.
            pooling: ``cls``, ``mean`` or ``max``; where ``None``, what the model's files say, or
                else ``mean``.
            device: ``auto`` leaves a model where it is, and loads one to the GPU if there is one.
            dtype: ``auto`` is the checkpoint's own.
            backend: as for :func:`~encoder_fast.patch`. With ``auto``, a model that has no fast
                path runs its own forward, and a warning and :meth:`report` say why.
            max_tokens_per_batch: chosen by device and free memory where ``None``. It is halved
                whenever memory runs out.
            cuda_graphs: as for :func:`~encoder_fast.patch`, for few or short texts at a time.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: no tokenizer, or an option has a value that it can't have.
            ModelFilesError: a file of the model is damaged, or asks for what is not supported.
            UnsupportedModelError, BackendUnavailableError: only for a backend asked for by name, or
                with ``cuda_graphs``.
        """
        model, tokenizer, settings = load(path_or_model, tokenizer, pooling, device, dtype)
        made = cls(
            model,
            tokenizer,
            settings,
            backend=backend,
            cuda_graphs=cuda_graphs,
            max_tokens_per_batch=max_tokens_per_batch,
        )
        if made._runner.refusal is not None:
            warn_caller(
                f"{type(model).__name__} runs its own padded forward: {made._runner.refusal}"
            )
        return made

    @property
    def dimension(self) -> int:
        """The length of a vector, before ``truncate_dim``."""
        return self._runner.encoder.config.hidden_size

    @property
    def max_length(self) -> int:
        """The longest input in tokens, special tokens counted; settable up to the positions."""
        return self._pipeline.max_length

    @max_length.setter
    def max_length(self, tokens: int) -> None:
        specials, limit = self._pipeline.single.size, positions(self.model)
        if tokens <= specials or (limit is not None and tokens > limit):
            raise ValueError(
                f"max_length must be more than the {specials} special tokens and at most the "
                f"model's {limit} positions, got {tokens}"
            )
        self._pipeline.max_length = tokens

    @property
    def tokens_per_batch(self) -> int:
        """The most tokens that a batch holds; less after each time that memory ran out."""
        return self._pipeline.budget.tokens

    @tokens_per_batch.setter
    def tokens_per_batch(self, tokens: int) -> None:
        self._pipeline.budget = TokenBudget(tokens)

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        normalize: bool | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        precision: str = "float32",
        long_text: str = "truncate",
        return_chunks: bool = False,
        show_progress: bool = False,
    ) -> np.ndarray | Chunks:
        """A vector for each text.

        Args:
            texts: a string, or an iterable of strings of any length. It is read as it goes.
            normalize: to length 1. ``None`` does what the model's files say; ``False`` does not
                even where they do.
            prompt: the name of one of the model's prompts, or a text, that is put before each
                text; the model's default where ``None``, none where ``""``.
            truncate_dim: keep that many values of each vector, for models trained so (Matryoshka).
            precision: ``float32``, ``int8`` (each dimension scaled by its range over all texts) or
                ``binary`` (signs, eight to a byte).
            long_text: what happens to a text longer than the model takes: ``truncate`` cuts it and
                a warning says how many were cut; ``chunk`` reads all of it in overlapping windows
                and averages their vectors by tokens, none counted twice; ``error`` raises.
            return_chunks: with ``chunk``, a vector for each window in place of one for each text.
            show_progress: a bar in texts and tokens a second.

        Returns:
            ``(N, D)``, or ``(D,)`` for a single string; or :class:`Chunks`.

        Raises:
            TypeError: something is no string; the message names its index.
            ValueError: an option has a value that it can't have.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
        if return_chunks and long_text != "chunk":
            raise ValueError(f"return_chunks needs long_text='chunk', got {long_text!r}")
        plan = Plan(long_text, self._prompt(prompt, "SentenceTransformer"), detail=return_chunks)
        finish = self._finish(normalize, truncate_dim)
        if return_chunks:
            return self._encode_chunks(_listed(texts), plan, finish, precision, show_progress)
        parts = list(self._encode_blocks(_listed(texts), plan, finish, show_progress))
        width = min(self.dimension, finish.truncate_dim or self.dimension)
        vectors = np.concatenate([np.zeros((0, width), np.float32), *parts])
        if isinstance(texts, str) and precision == "float32":
            return vectors[0]
        quantised = quantise(vectors, precision)
        return quantised[0] if isinstance(texts, str) else quantised

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        normalize: bool | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        long_text: str = "truncate",
        block_size: int | None = None,
        show_progress: bool = False,
    ) -> Iterator[np.ndarray]:
        """As :meth:`encode`, for more texts than memory holds vectors of.

        Args:
            block_size: how many texts are held and yielded at a time. ``None`` begins with few and
                goes up to 4,096. Texts of some millions of characters end a block early. Which
                texts share a batch depends on the blocks, so only with a given ``block_size`` does
                a run that starts at the beginning of a block repeat it bit by bit.

        Yields:
            Float32 vectors ``(n, D)`` of the next ``n`` texts, in order.
        """
        plan = Plan(long_text, self._prompt(prompt, "SentenceTransformer"), block_size=block_size)
        finish = self._finish(normalize, truncate_dim)
        return self._encode_blocks(_listed(texts), plan, finish, show_progress)

    def similarity(
        self,
        a: str | Iterable[str] | np.ndarray | Tensor,
        b: str | Iterable[str] | np.ndarray | Tensor,
    ) -> np.ndarray:
        """How alike texts are, ``(len(a), len(b))``: the cosine, or what the model's files say.

        Float vectors, as from :meth:`encode`, may stand for texts.
        """
        left, right = (self._as_vectors(side) for side in (a, b))
        if self.settings.similarity == "cosine":
            left, right = F.normalize(left, dim=-1), F.normalize(right, dim=-1)
        return (left @ right.T).numpy()

    def token_embeddings(
        self,
        texts: str | Iterable[str],
        *,
        long_text: str = "truncate",
        show_progress: bool = False,
    ) -> Any:
        """A vector for each token, special tokens included.

        Returns:
            A list of :class:`TokenEmbeddings`, or one for a single string. With ``chunk`` each
            token's vector is from the window where it has most context around it.
        """
        found = []
        plan = Plan(long_text)
        lead = len(self._pipeline.single.specials[0])
        blocks = self._run(_listed(texts), plan, self._runner.states, show_progress)
        for block, results in blocks:
            for text in per_token(block, results, lead):
                before, after = text.special_ids
                ids = np.concatenate([before, text.tokens.ids, after])
                vectors = torch.cat([text.before, text.content, text.after]).numpy()
                found.append(TokenEmbeddings(self._pipeline.tokeniser.names(ids), vectors))
        return found[0] if isinstance(texts, str) else found

    def classify(
        self,
        texts: str | Iterable[str],
        *,
        long_text: str = "truncate",
        show_progress: bool = False,
    ) -> Any:
        """The label of each text and every label's probability.

        Returns:
            A list of :class:`Classification`, or one for a single string. With ``chunk`` a long
            text's logits are the mean over its windows by tokens.

        Raises:
            ValueError: the model has no sequence classification head.
        """
        blocks = self.classify_stream(texts, long_text=long_text, show_progress=show_progress)
        found = [one for block in blocks for one in block]
        return found[0] if isinstance(texts, str) else found

    def classify_stream(
        self,
        texts: Iterable[str],
        *,
        long_text: str = "truncate",
        block_size: int | None = None,
        show_progress: bool = False,
    ) -> Iterator[list[Classification]]:
        """As :meth:`classify`, a block of texts at a time; see :meth:`encode_stream`."""
        self._need_head("ForSequenceClassification", "classify")
        if self.model.config.problem_type == "regression":
            raise ValueError("classify needs labels, and this model's head is one for regression")
        plan = Plan(long_text, block_size=block_size)
        blocks = self._run(_listed(texts), plan, self._runner.scores, show_progress)
        return (
            classifications(
                whole_texts(torch.stack(results).cpu(), block.windows, "mean"), self.model.config
            )
            for block, results in blocks
        )

    def tag(
        self,
        texts: str | Iterable[str],
        *,
        aggregation_strategy: str = "first",
        long_text: str = "chunk",
        show_progress: bool = False,
    ) -> Any:
        """The named entities of each text, however long.

        Args:
            aggregation_strategy: how labels of tokens become entities, by transformers' names. A
                word has the label of its ``first`` token, of the ``average`` of its tokens'
                probabilities, or of the token that is surest (``max``); ``simple`` puts tokens
                together without regard to words, and ``none`` gives each token by itself. Words
                are told by the text and not by the tokenizer (``docs/classify-and-tag.md``).

        Returns:
            For each text a list of :class:`Entity`, with character offsets into it; one such list
            for a single string.

        Raises:
            ValueError: the model has no token classification head, or its tokenizer no offsets; or
                no such strategy.
        """
        blocks = self.tag_stream(
            texts,
            aggregation_strategy=aggregation_strategy,
            long_text=long_text,
            show_progress=show_progress,
        )
        found = [one for block in blocks for one in block]
        return found[0] if isinstance(texts, str) else found

    def tag_stream(
        self,
        texts: Iterable[str],
        *,
        aggregation_strategy: str = "first",
        long_text: str = "chunk",
        block_size: int | None = None,
        show_progress: bool = False,
    ) -> Iterator[list[list[Entity]]]:
        """As :meth:`tag`, a block of texts at a time; see :meth:`encode_stream`."""
        self._need_head("ForTokenClassification", "tag")
        check_strategy(aggregation_strategy)
        labels = read_labels(label_names(self.model.config))
        spaces = self._pipeline.tokeniser.space_ids
        lead = len(self._pipeline.single.specials[0])
        plan = Plan(long_text, detail=True, block_size=block_size)
        blocks = self._run(_listed(texts), plan, self._runner.token_scores, show_progress)
        return (
            [
                entities(
                    text.text,
                    text.tokens,
                    torch.softmax(text.content, dim=-1).numpy(),
                    labels,
                    aggregation_strategy,
                    spaces,
                )
                for text in per_token(block, results, lead)
            ]
            for block, results in blocks
        )

    def rerank(
        self,
        query: str,
        texts: Iterable[str],
        *,
        top_k: int | None = None,
        prompt: str | None = None,
        long_text: str = "truncate",
        show_progress: bool = False,
    ) -> list[rerank.Ranked]:
        """Order texts by a cross-encoder's score for a query, the best first.

        Args:
            top_k: how many are returned; all where ``None``.
            prompt: as for :meth:`encode`, put before the query.
            long_text: ``truncate`` shortens the longer of query and text; with ``chunk`` a text
                scores as its best window does.

        Raises:
            ValueError: the model is no cross-encoder: a sequence classifier with one output.
        """
        self._need_head("ForSequenceClassification", "rerank")
        if not isinstance(query, str):
            raise TypeError(f"query must be a string, got {type(query).__name__}")
        asked = self._prompt(prompt, "CrossEncoder") + encodable(query)
        (tokens,) = self._pipeline.tokeniser.tokens([asked])
        plan = Plan(long_text, query=tokens.ids)
        activation = self.settings.activation
        ranked: list[rerank.Ranked] = []
        blocks = self._run(_listed(texts), plan, self._runner.scores, show_progress)
        for block, results in blocks:
            best = whole_texts(torch.stack(results).cpu(), block.windows, "max")
            scores = rerank.activate(best, activation, self.model.config).tolist()
            ranked += [
                rerank.Ranked(len(ranked) + number, score, text)
                for number, (score, text) in enumerate(zip(scores, block.texts, strict=True))
            ]
        return sorted(ranked, key=lambda one: -one.score)[:top_k]

    def report(self) -> TextReport:
        """What has run since the model was loaded, how, and what did not run fast, and why."""
        runner, pipeline = self._runner, self._pipeline
        return TextReport(
            model=runner.report,
            refusal=runner.refusal,
            texts=pipeline.texts,
            tokens=pipeline.tokens,
            cut=pipeline.cut,
            packed_batches=runner.packed,
            padded_batches=runner.padded,
            tokens_per_batch=pipeline.budget.tokens,
        )

    def _run(
        self, texts: Iterable[str], plan: Plan, compute: Compute, show_progress: bool
    ) -> Iterator[tuple[Block, list[Tensor]]]:
        """The pipeline, with a warning at its end where texts were cut."""
        # as sentence-transformers does: with dropout the same text has no vector of its own
        self.model.eval()
        cut = total = 0
        for block, results in self._pipeline.run(texts, plan, compute, show_progress=show_progress):
            cut += block.cut
            total += len(block.texts)
            yield block, results
        if cut:
            warn_caller(
                f"{cut:,} of {total:,} texts were longer than {self.max_length} tokens and were "
                "cut; long_text='chunk' reads all of a text"
            )

    def _vectors(
        self, texts: Iterable[str], plan: Plan, show_progress: bool
    ) -> Iterator[tuple[Block, Tensor]]:
        """The pooled vector of each window, ``(n, D)``, on the CPU."""
        pooling = self.settings.pooling
        for block, results in self._run(
            texts, plan, lambda rows: self._runner.pooled(rows, pooling), show_progress
        ):
            # one transfer, where the GPU is waited for, for the whole block
            yield block, torch.stack(results).cpu()

    def _encode_blocks(
        self, texts: Iterable[str], plan: Plan, finish: Finish, show_progress: bool
    ) -> Iterator[np.ndarray]:
        for block, vectors in self._vectors(texts, plan, show_progress):
            yield finish(whole_texts(vectors, block.windows, self.settings.pooling))

    def _encode_chunks(
        self, texts: Iterable[str], plan: Plan, finish: Finish, precision: str, show_progress: bool
    ) -> Chunks:
        parts, places = [np.zeros((0, self.dimension), np.float32)[:, : finish.truncate_dim]], []
        done = 0
        for block, vectors in self._vectors(texts, plan, show_progress):
            parts.append(finish(vectors))
            for window in block.windows:
                offsets = block.tokens[window.text].offsets
                assert offsets is not None
                inside = offsets[window.start : window.stop]
                start, stop = (inside[0, 0], inside[-1, 1]) if len(inside) else (0, 0)
                places.append((done + window.text, start, stop))
            done += len(block.texts)
        text, start, stop = np.array(places, dtype=np.int64).reshape(-1, 3).T
        return Chunks(quantise(np.concatenate(parts), precision), text, start, stop)

    def _prompt(self, prompt: str | None, kind: str) -> str:
        """The text for ``prompt``, in a method that is that ``kind`` of model's own."""
        settings = self.settings
        prompts = settings.prompts if settings.kind == kind else {}
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string, got {type(prompt).__name__}")
        if prompt is None:
            default = settings.default_prompt
            return "" if default is None else encodable(prompts.get(default, ""))
        return encodable(prompts.get(prompt, prompt))

    def _finish(self, normalize: bool | None, truncate_dim: int | None) -> Finish:
        kept = self.settings.truncate_dim if truncate_dim is None else truncate_dim
        if kept is not None and (not isinstance(kept, int) or kept < 1):
            raise ValueError(f"truncate_dim must be an integer of at least 1, got {kept!r}")
        by_model = self.settings.normalize and normalize is not False
        return Finish(by_model, kept, normalize is True)

    def _as_vectors(self, side: str | Iterable[str] | np.ndarray | Tensor) -> Tensor:
        if isinstance(side, np.ndarray) and side.dtype.kind in "iuf":
            side = torch.from_numpy(side)
        if isinstance(side, Tensor):
            if not side.is_floating_point():
                raise ValueError(f"similarity is for float vectors, not {side.dtype}")
            return torch.atleast_2d(side.detach().float().cpu())
        vectors = self.encode(_listed(side))
        assert isinstance(vectors, np.ndarray)
        return torch.from_numpy(vectors)

    def _need_head(self, head: str, method: str) -> None:
        name = type(self.model).__name__
        if not name.endswith(head):
            raise ValueError(f"{method} needs a model …{head}, and this is a {name}")


def _listed(texts: Any) -> Iterable[str]:
    """``texts``, a single string as a list of one."""
    if isinstance(texts, str):
        return [texts]
    check_iterable(texts)
    return texts
