"""Calling a patched encoder when the lengths are known on the host: no mask is read, no waiting.

Two ways in. :func:`encode_packed` gives the encoder's last hidden state still packed, for whoever
pools it. :func:`known_batch` lets a model with a head be called as ever, and tells the encoder in
it what it would otherwise read from the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from encoder_fast.errors import NotFastError
from encoder_fast.packing import PackedBatch
from encoder_fast.patching.head import is_watched
from encoder_fast.patching.locate import STATE

_known: ContextVar[PackedBatch | None] = ContextVar("known_batch", default=None)


@contextmanager
def known_batch(batch: PackedBatch) -> Iterator[None]:
    """Patched encoders called in this block with inputs of ``batch.shape`` pack them by ``batch``.

    The caller vouches that the mask it gives says the same, and that all ids are in range.
    """
    token = _known.set(batch)
    try:
        yield
    finally:
        _known.reset(token)


def batch_known_for(shape: tuple[int, int]) -> PackedBatch | None:
    """What :func:`known_batch` said of inputs of this shape, in this thread."""
    batch = _known.get()
    return batch if batch is not None and batch.shape == shape else None


def encode_packed(
    model: nn.Module,
    batch: PackedBatch,
    input_ids: Tensor,
    token_type_ids: Tensor | None = None,
    *,
    first_token_alone: bool = False,
) -> Tensor:
    """The last hidden state ``(total, N)`` of a patched encoder over packed tokens.

    Counted in :func:`~encoder_fast.report` as a fast call.

    Args:
        model: a patched bare encoder in eval mode; gradients must be off.
        batch: right-padded, as from :func:`~encoder_fast.packing.pack_lengths`.
        input_ids, token_type_ids: int64 ``(total,)`` on the model's device, in range.
        first_token_alone: return the first token's state of each row, ``(B, N)``, which takes the
            last layer less work.

    Raises:
        NotFastError: it can't run fast now. Nothing is counted: the padded forward, which the
            caller runs then, does that.
    """
    state: Any = model.__dict__.get(STATE)
    if state is None:
        raise NotFastError("the model is not patched")
    if is_watched(model):
        raise NotFastError("a hook or a forward on the encoder, which only a call runs")
    # Only the ids are padded, so that this call and a padded one share all that follows.
    inputs = {"input_ids": batch.unpack(input_ids)}
    if token_type_ids is not None:
        inputs["token_type_ids"] = batch.unpack(token_type_ids)
    with known_batch(batch):
        return state.encode_packed(model, inputs, first_token_alone)
