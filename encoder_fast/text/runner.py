"""Rows through the model: packed where it runs fast, padded through its own forward where not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from encoder_fast.backends import resolve
from encoder_fast.errors import BackendUnavailableError, NotFastError, UnsupportedModelError
from encoder_fast.ops.pool import operator as pool
from encoder_fast.packing import PackedBatch, pack_lengths, to_device
from encoder_fast.patching import patch, report
from encoder_fast.patching.arguments import parameter_names
from encoder_fast.patching.packed import encode_packed, known_batch
from encoder_fast.patching.reporting import Report
from encoder_fast.text.tokenising import Row


class Runner:
    """One model, patched in place if it can be.

    Attributes:
        model: with its head, if it has one.
        encoder: the encoder in it.
        refusal: why the model could not be patched, or ``None``.
        packed, padded: batches that ran in either way.
    """

    def __init__(self, model: nn.Module, backend: str, cuda_graphs: bool = False) -> None:
        self.model = model
        self._backend = backend
        self.encoder: nn.Module = model.base_model
        self.refusal: str | None = None
        self.packed = self.padded = 0
        self._vocabulary = self.encoder.get_input_embeddings().num_embeddings
        try:
            patch(model, backend, cuda_graphs=cuda_graphs)
        except (UnsupportedModelError, BackendUnavailableError) as error:
            # what was asked for runs or raises
            if backend != "auto" or cuda_graphs:
                raise
            self.refusal = str(error)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def report(self) -> Report:
        return report(self.model)

    @torch.inference_mode()
    def pooled(self, rows: Sequence[Row], mode: str) -> Tensor:
        """One vector a row, ``(B, N)``, float32."""
        if mode == "cls":
            hidden, _ = self._hidden(rows, first_token_alone=True)
            return hidden.float()
        hidden, batch = self._hidden(rows)
        return pool.run(hidden, batch.cu_seqlens, mode, self._pool_backend(hidden.device))

    @torch.inference_mode()
    def states(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """The last hidden state of each row, ``(n, N)``, float32, on the CPU."""
        hidden, _ = self._hidden(rows)
        return hidden.float().cpu().split([len(row.ids) for row in rows])

    @torch.inference_mode()
    def scores(self, rows: Sequence[Row]) -> Tensor:
        """The head's output for each row, ``(B, labels)``, float32."""
        ids, types, batch = self._pack(rows)
        return self._forward(self.model, ids, types, batch).logits.float()

    @torch.inference_mode()
    def token_scores(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """The head's output for each token of each row, ``(n, labels)``, float32, on the CPU."""
        ids, types, batch = self._pack(rows)
        logits = self._forward(self.model, ids, types, batch).logits
        return batch.pack(logits).float().cpu().split([len(row.ids) for row in rows])

    def _hidden(
        self, rows: Sequence[Row], first_token_alone: bool = False
    ) -> tuple[Tensor, PackedBatch]:
        ids, types, batch = self._pack(rows)
        if self.refusal is None:
            try:
                hidden = encode_packed(
                    self.encoder, batch, ids, types, first_token_alone=first_token_alone
                )
                self.packed += 1
                return hidden, batch
            except NotFastError:
                # the forward below refuses for the same reason, and counts it
                pass
        output = self._forward(self.encoder, ids, types, batch)
        hidden = batch.pack(output.last_hidden_state)
        if first_token_alone:
            hidden = batch.blank_empty_rows(batch.first_tokens(hidden))
        return hidden, batch

    def _forward(
        self, model: nn.Module, ids: Tensor, types: Tensor | None, batch: PackedBatch
    ) -> Any:
        """The model's own forward over a padded batch; a patched encoder in it packs it again."""
        inputs = {
            # what id stands where the mask is 0 makes no difference
            "input_ids": batch.unpack(ids),
            "attention_mask": batch.unpack(torch.ones_like(ids)),
        }
        cls: Any = type(model)
        if types is not None and "token_type_ids" in parameter_names(cls):
            inputs["token_type_ids"] = batch.unpack(types)
        before = self.report.fast_calls
        with known_batch(batch):
            output = model(**inputs)
        if self.report.fast_calls > before:
            self.packed += 1
        else:
            self.padded += 1
        return output

    def _pool_backend(self, device: torch.device) -> str:
        return "reference" if self.refusal is not None else resolve(self._backend, device)[0]

    def _pack(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor | None, PackedBatch]:
        ids = np.concatenate([row.ids for row in rows])
        if ids.size and ids.max() >= self._vocabulary:
            raise IndexError(
                f"the tokenizer gave id {ids.max()}, the model has {self._vocabulary} embeddings: "
                "they don't belong together"
            )
        types = None
        if any(row.types is not None for row in rows):
            types = np.concatenate(
                [np.zeros_like(row.ids) if row.types is None else row.types for row in rows]
            )
        device = self.device
        batch = pack_lengths([len(row.ids) for row in rows], device=device)
        on_device = to_device(torch.from_numpy(ids), device)
        if types is None:
            return on_device, None, batch
        return on_device, to_device(torch.from_numpy(types), device), batch
