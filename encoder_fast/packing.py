"""Packing: a padded batch as one row of tokens, and back.

``pack`` turns a padding mask into a :class:`PackedBatch`: where each real token sits in the padded
batch, and where each sequence begins among the packed tokens. It runs once per forward, before the
embeddings; everything between it and :meth:`PackedBatch.unpack` knows nothing of padding.

One kind of padding may be packed too, behind the tokens: the first column of a row that begins with
padding, where somebody reads it. It attends to the row's tokens and no token attends to it; the
code calls it an onlooker.

What a mask says is read by the backend: plain PyTorch, some forty launches on a GPU, or Triton's
kernels, three.

Host synchronisation: one when the lengths have to be read from a mask on a GPU
(:func:`read_mask`), none when there is no mask or when the lengths are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder_fast.backends import load


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Where the real tokens of a padded batch are, and its onlookers, if it has any.

    What is packed has one row a token, behind those one an onlooker, and behind them the filler.
    Where a shape here or in the engine says ``total``, both come on top of it.

    Attributes:
        cu_seqlens: int32 ``(B + 1,)``; sequence ``b`` is ``cu_seqlens[b]:cu_seqlens[b + 1]``.
        max_seqlen: the longest sequence, in tokens.
        total: the number of real tokens.
        batch_size: ``B``, rows without a token included.
        padded_length: ``S``, the columns of the padded batch.
        indices: int64 ``(total,)``, each token's place in the flattened ``(B * S)`` batch; ``None``
            when there is no padding, so that packing is a view.
        onlooker_rows: int64, the row ``b`` of each onlooker; ``None`` where there are none.
        has_gaps: in some row there is padding between two tokens.
        filler: rows at the end that belong to nobody; see :meth:`filled`.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    total: int
    batch_size: int
    padded_length: int
    indices: Tensor | None
    onlooker_rows: Tensor | None = None
    has_gaps: bool = False
    filler: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, S)`` of the padded batch."""
        return self.batch_size, self.padded_length

    def filled(self, rows: int) -> PackedBatch:
        """With as many rows as a backend likes best. Those that are not there yet are zeros in what
        is packed; attention gives zeros for them, and everything else goes row by row. A batch of
        no tokens or with onlookers, whose place is the end, stays as it is."""
        if self.total == 0 or self.onlooker_rows is not None:
            return self
        return replace(self, filler=rows - self.total)

    def without_filler(self, packed: Tensor) -> Tensor:
        """``(total + filler, ...)`` to ``(total, ...)``; a view."""
        return packed[: packed.shape[0] - self.filler] if self.filler else packed

    def pack(self, padded: Tensor) -> Tensor:
        """``(B, S, ...)`` to ``(total, ...)``; a leading dimension of 1 is broadcast to ``B``."""
        if padded.shape[0] != self.batch_size:
            padded = padded.expand(self.batch_size, *padded.shape[1:])
        flat = padded.reshape(self.batch_size * self.padded_length, *padded.shape[2:])
        if self.indices is not None:
            flat = flat.index_select(0, self.indices)
        return self._with_filler(flat)

    def _with_filler(self, packed: Tensor) -> Tensor:
        if not self.filler:
            return packed
        return F.pad(packed, (0, 0) * (packed.dim() - 1) + (0, self.filler))

    def unpack(self, packed: Tensor, *, onlookers: bool = False) -> Tensor:
        """``(total, ...)`` to ``(B, S, ...)``, zeros where the batch is padded; with ``onlookers``
        except where those stand."""
        packed = self.without_filler(packed)
        rest = packed.shape[1:]
        if self.indices is None:
            return packed.reshape(*self.shape, *rest)
        indices = self.indices
        if self.onlooker_rows is not None and not onlookers:
            indices, packed = indices[: self.total], packed[: self.total]
        flat = packed.new_zeros(self.batch_size * self.padded_length, *rest)
        return flat.index_copy_(0, indices, packed).view(*self.shape, *rest)

    def first_tokens(self, packed: Tensor) -> Tensor:
        """``(total, ...)`` to ``(B, ...)``: the first token of each row, or its onlooker.

        A row without tokens gets some token's; see :meth:`blank_empty_rows`.
        """
        if self.total == 0:
            return packed.new_zeros(self.batch_size, *packed.shape[1:])
        # an empty row begins where the next one does, and the last of them behind the end
        places = self.cu_seqlens[:-1].clamp(max=self.total - 1)
        if self.onlooker_rows is not None:
            behind = torch.arange(
                self.total, packed.shape[0], device=places.device, dtype=places.dtype
            )
            places = places.index_copy(0, self.onlooker_rows, behind)
        return packed.index_select(0, places)

    def blank_empty_rows(self, rows: Tensor) -> Tensor:
        """``(B, N)`` with zeros for the rows that have no token."""
        return rows.masked_fill_((self.cu_seqlens.diff() == 0).unsqueeze(1), 0)

    def pack_into(self, out: Tensor, padded: Tensor) -> None:
        """Write the ``(total,)`` of :meth:`pack` to the front of ``out``, without a copy between
        where the dtypes are the same."""
        out = out[: self.total]
        if self.indices is None or padded.shape[0] != self.batch_size or padded.dtype != out.dtype:
            out.copy_(self.pack(padded))
        else:
            torch.index_select(padded.reshape(-1), 0, self.indices, out=out)

    def columns_into(self, out: Tensor) -> None:
        """Write the ``(total,)`` of :meth:`columns` to the front of ``out``."""
        if self.indices is None:
            out[: self.total].copy_(self.columns())
        else:
            torch.remainder(self.indices, self.padded_length, out=out[: self.total])

    def columns(self) -> Tensor:
        """int64 ``(total,)``: each token's column in the padded batch."""
        if self.indices is None:
            columns = torch.arange(self.padded_length, device=self.cu_seqlens.device)
            columns = columns.repeat(self.batch_size)
        else:
            columns = self.indices % self.padded_length
        return self._with_filler(columns)

    def windows(self, packed: Tensor, size: int) -> Tensor:
        """``(total, N)`` to ``(total, size, N)``: each token amid its neighbours of its own
        row, and zeros where there are none. ``size`` is odd."""
        if self.has_gaps:
            padded = F.pad(self.unpack(packed), (0, 0, size // 2, size // 2))
            return self.pack(padded.unfold(1, size, 1)).transpose(1, 2)
        tokens = torch.arange(packed.shape[0], device=packed.device, dtype=torch.int32)
        sequence = torch.searchsorted(self.cu_seqlens[1:], tokens, right=True)
        sequence = sequence.clamp_(max=self.batch_size - 1)
        first, end = self.cu_seqlens[sequence], self.cu_seqlens[sequence + 1]
        reach = torch.arange(-(size // 2), size // 2 + 1, device=packed.device, dtype=torch.int32)
        places = tokens[:, None] + reach
        outside = (places < first[:, None]) | (places >= end[:, None])
        places = places.clamp_(0, packed.shape[0] - 1).view(-1)
        gathered = packed.index_select(0, places).view(packed.shape[0], size, packed.shape[1])
        return gathered.masked_fill_(outside[:, :, None], 0)


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """What :func:`read_mask` found: what the host has to know of a mask, in one transfer, and what
    stays on the device for :func:`pack`.

    Attributes:
        total: the number of ones.
        max_seqlen: the ones of the fullest row.
        is_binary: every value is 0 or 1.
        headless: how many rows have a token, but none in column 0.
        has_gaps: in some row a zero lies between two ones.
        ids_in_range: the id of every token, and every onlooker if there are to be any, is within
            the range asked about.
        lengths: integers ``(B,)``, the ones of each row.
        headless_rows: boolean ``(B,)``, which rows are headless.
    """

    total: int
    max_seqlen: int
    is_binary: bool
    headless: int
    has_gaps: bool
    ids_in_range: bool
    lengths: Tensor
    headless_rows: Tensor


def read_mask(
    mask: Tensor,
    input_ids: Tensor | None = None,
    vocab_size: int = 0,
    *,
    onlookers: bool = False,
    backend: str = "reference",
) -> MaskFacts:
    """Read all the host needs of a ``(B, S)`` mask in one device-to-host transfer.

    With ``input_ids``, ``(B, S)`` too, it also checks, in the same transfer, that the real tokens'
    ids, and with ``onlookers`` those in column 0 of rows that begin with padding, lie in
    ``[0, vocab_size)``: on a GPU a wrong id otherwise kills the CUDA context.
    """
    if mask.numel() == 0:
        none = torch.zeros(mask.shape[0], dtype=torch.int32, device=mask.device)
        return MaskFacts(0, 0, True, 0, False, True, none, none.bool())
    facts, lengths, headless_rows = load(backend).count_tokens(
        mask, input_ids, vocab_size, onlookers
    )
    total, longest, headless, has_gaps, other_values, outside = facts.tolist()
    return MaskFacts(
        total,
        longest,
        not other_values,
        headless,
        bool(has_gaps),
        not outside,
        lengths,
        headless_rows,
    )


def pack(
    mask: Tensor,
    facts: MaskFacts | None = None,
    *,
    onlookers: bool = False,
    backend: str = "reference",
) -> PackedBatch:
    """Pack by a padding mask.

    Args:
        mask: ``(B, S)``, 1 for a real token and 0 for padding, of any dtype. The padding may be on
            the right, on the left or anywhere between; rows without a token are fine.
        facts: what :func:`read_mask` found of this mask, where the caller has it already.
        onlookers: also pack column 0 of the rows that begin with padding and have a token.
        backend: whose kernels read the mask; all give the same.

    Raises:
        ValueError: the mask is not two-dimensional, or holds values other than 0 and 1.
    """
    if mask.dim() != 2:
        raise ValueError(f"mask must have shape (B, S), got {tuple(mask.shape)}")
    if facts is None:
        facts = read_mask(mask, backend=backend)
    if not facts.is_binary:
        raise ValueError("mask must hold 0 and 1 only")
    batch_size, padded_length = mask.shape
    if facts.total == mask.numel():
        return pack_full(batch_size, padded_length, mask.device)
    cu_seqlens, indices, onlooker_rows = load(backend).place_tokens(
        mask,
        facts.lengths,
        facts.headless_rows,
        facts.total,
        facts.headless if onlookers else 0,
    )
    return PackedBatch(
        cu_seqlens,
        facts.max_seqlen,
        facts.total,
        batch_size,
        padded_length,
        indices,
        onlooker_rows,
        facts.has_gaps,
    )


def pack_full(batch_size: int, padded_length: int, device: torch.device | str) -> PackedBatch:
    """A batch without padding: nothing to read from the device, nothing to copy."""
    cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * padded_length
    total = batch_size * padded_length
    longest = padded_length if batch_size else 0
    return PackedBatch(cu_seqlens, longest, total, batch_size, padded_length, None)


def pack_lengths(
    lengths: Sequence[int], *, padded_length: int | None = None, device: torch.device | str = "cpu"
) -> PackedBatch:
    """Pack right-padded sequences whose lengths are known on the host: no synchronisation.

    Args:
        lengths: tokens of each sequence, zero included.
        padded_length: columns of the padded batch; the longest sequence where it is ``None``.
        device: where the index tensors go.

    Raises:
        ValueError: a length is negative or exceeds ``padded_length``.
    """
    longest = max(lengths, default=0)
    padded = longest if padded_length is None else padded_length
    if longest > padded or min(lengths, default=0) < 0:
        raise ValueError(f"lengths must lie in [0, {padded}], got {list(lengths)}")
    host = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    total = int(host.sum())
    if total == len(lengths) * padded:
        return pack_full(len(lengths), padded, device)
    ends = host.cumsum(0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    # token i of sequence b sits at b * S + (i - start of b)
    row_shift = torch.arange(len(lengths), device="cpu") * padded - (ends - host)
    indices = torch.arange(total, device="cpu") + torch.repeat_interleave(row_shift, host)
    return PackedBatch(
        to_device(cu_seqlens, device),
        longest,
        total,
        len(lengths),
        padded,
        to_device(indices, device),
    )


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device, without waiting for what is queued there."""
    if torch.device(device).type == "cuda":
        # a copy from other memory waits until the GPU comes to it
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
