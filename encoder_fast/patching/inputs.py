"""From the tensors of a call to a packed batch, and what may be wrong with them."""

from __future__ import annotations

import torch
from torch import Tensor

from encoder_fast.backends import load
from encoder_fast.backends.memory import lacks_memory
from encoder_fast.errors import NotFastError
from encoder_fast.graphs import Inputs
from encoder_fast.packing import PackedBatch, pack, pack_full, read_mask
from encoder_fast.patching.arguments import Arguments
from encoder_fast.patching.packed import batch_known_for
from encoder_fast.patching.readers import Readers
from encoder_fast.spec import EncoderSpec
from encoder_fast.streams import is_captured


def _misfit(name: str, tensor: Tensor) -> str:
    # Without sizes: reasons are counted, and there are only so many of them.
    return f"{name} of {tensor.dim()} dimensions and {tensor.dtype}, or of a size that does not fit"


def _check_tensors(call: Arguments, like: Tensor) -> tuple[int, int]:
    """Check what comes in against the model; returns ``(B, S)``."""
    if call.input_ids is not None:
        if call.input_ids.dim() != 2 or call.input_ids.dtype not in (torch.int64, torch.int32):
            raise NotFastError(_misfit("input_ids", call.input_ids))
    else:
        embeds = call.source
        if embeds.dim() != 3 or embeds.dtype != like.dtype or embeds.shape[2] != like.shape[1]:
            raise NotFastError(_misfit("inputs_embeds", embeds))
    batch_size, length = call.source.shape[:2]
    for name in ("token_type_ids", "position_ids"):
        ids = getattr(call, name)
        if ids is not None and (
            ids.dim() != 2
            or ids.shape[0] not in (1, batch_size)
            or ids.shape[1] != length
            or ids.dtype not in (torch.int64, torch.int32)
        ):
            raise NotFastError(_misfit(name, ids))
    mask = call.attention_mask
    if mask is not None and mask.shape != (batch_size, length):
        raise NotFastError(_misfit("attention_mask", mask))
    for name in ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"):
        tensor = getattr(call, name)
        if tensor is not None and tensor.device != like.device:
            raise NotFastError(f"{name} on {tensor.device}, the model on {like.device}")
        # PyTorch raises the same, or kills the process.
        if tensor is not None and lacks_memory(tensor):
            raise RuntimeError(f"the storage of {name} was freed")
    return batch_size, length


def pack_call(
    call: Arguments, spec: EncoderSpec, backend: str, reads_first: bool, readers: Readers
) -> PackedBatch:
    """Check the tensors of a call and pack it, which on a GPU waits for what its mask says.

    Args:
        reads_first: a pooler or head that is known reads column 0, padding or not.
        readers: who else reads what is returned.

    Raises:
        NotFastError: the fast path can't take them.
        ValueError, IndexError: a text is too long, or an id not in the vocabulary.
        RuntimeError: the storage of an input was freed.
    """
    like = spec.embeddings.word.weight
    if like.dtype not in load(backend).DTYPES:
        raise NotFastError(f"dtype {like.dtype} on backend {backend}")
    shape = _check_tensors(call, like)
    _check_length(call, shape, spec)
    mask = call.attention_mask
    known = batch_known_for(shape)
    if known is not None:
        if known.indices is not None:
            _check_padding(readers, mask)
        return known
    if mask is None:
        return pack_full(*shape, like.device)
    if is_captured(mask.device):
        raise NotFastError("an attention_mask, whose lengths nobody can read into a CUDA graph")
    vocab_size = like.shape[0]
    # On the CPU the lookup itself checks the ids.
    ids = call.input_ids if mask.device.type != "cpu" else None
    facts = read_mask(mask, ids, vocab_size, onlookers=reads_first, backend=backend)
    if not facts.is_binary:
        raise NotFastError("an attention_mask with values other than 0 and 1")
    if not facts.ids_in_range:
        raise IndexError(f"input_ids must lie in [0, {vocab_size})")
    if facts.total < mask.numel():
        _check_padding(readers, mask)
    if facts.headless and readers.of_first_column is not None:
        raise NotFastError(
            f"a padded first column (left padding), which {readers.of_first_column} may read"
        )
    if reads_first and facts.headless and not spec.has_onlookers(shape[1]):
        raise NotFastError(
            "a pooler or head over a padded first column (left padding), and attention that is not "
            "plain softmax"
        )
    # Where column 0 is padding, the original pools what a padding token there sees of the text.
    return pack(mask, facts, onlookers=reads_first, backend=backend)


def _check_padding(readers: Readers, mask: Tensor | None) -> None:
    """Refuse a batch with padding that is read."""
    if readers.of_padding is not None:
        raise NotFastError(f"padding under {readers.of_padding}")
    if readers.labels is None or mask is None:
        return
    labels, name = readers.labels
    # Who asks for a loss looks at it, so one more look at the device does no harm.
    if labels.shape == mask.shape and bool(((labels != -100) & (mask == 0)).any()):
        raise NotFastError(f"padding under the loss of {name}, with labels other than -100 there")


def _check_length(call: Arguments, shape: tuple[int, int], spec: EncoderSpec) -> None:
    """Raise ``ValueError`` where a row has more positions than the model."""
    limit, length = spec.embeddings.max_positions, shape[1]
    if limit is None or call.position_ids is not None or length <= limit:
        return
    padding_idx = spec.embeddings.position_padding_idx
    # Embeddings have no id to skip: their positions count all columns.
    if padding_idx is not None and call.input_ids is not None:
        if is_captured(call.input_ids.device):
            raise NotFastError(
                "more columns than positions, which nobody can count in a CUDA graph"
            )
        # Whatever the mask says. So wide a batch is rare, and worth the wait on a GPU.
        length = int((call.input_ids != padding_idx).sum(dim=1).max()) if shape[0] else 0
    if length > limit:
        raise ValueError(f"input of length {length} exceeds the model's limit of {limit} positions")


def inputs_of(call: Arguments, spec: EncoderSpec, batch: PackedBatch) -> Inputs:
    """What a call gives a forward to read, padded as it came."""
    padding_idx = spec.embeddings.position_padding_idx
    positions = call.position_ids
    if positions is None and padding_idx is not None and call.input_ids is not None:
        # RoBERTa goes by the ids and not by the mask: the two differ where a mask has holes.
        counted = call.input_ids != padding_idx
        positions = counted.cumsum(dim=1) * counted + padding_idx
    return Inputs(batch, call.input_ids, call.token_type_ids, positions)


def positions_of(inputs: Inputs, padding_idx: int | None) -> Tensor:
    """The position of each packed token, ``(total,)``."""
    if inputs.position_ids is not None:
        return inputs.batch.pack(inputs.position_ids)
    columns = inputs.batch.columns()
    # Only embeddings without ids come here with a padding index.
    return columns if padding_idx is None else columns + (padding_idx + 1)
