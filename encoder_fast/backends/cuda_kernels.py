"""The ops over the CUDA extension: checks, allocation and the calls into it.

Shared by the backends ``cuda`` and ``cuda-host``, which differ in the extension alone. It takes
addresses and believes what it is told of them, so everything it relies on is checked here; what the
ops have checked already is not checked again.

GEMMs stay with cuBLAS, pooling with PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from encoder_fast.backends import linears
from encoder_fast.backends.linears import Activation, PreparedFeedForward, PreparedLinear

HEAD_SIZES: tuple[int, ...] | None = (32, 64, 128)
HEAD_SIZES_OF_OP: dict[str, tuple[int, ...]] = {"disentangled_attention": (32, 64)}
MAX_WIDTH: int | None = 8192
# What a whole encoder may be in: attention has no float32 kernel.
DTYPES = (torch.float16, torch.bfloat16)
DTYPES_OF_OP = dict.fromkeys(
    ("add_layer_norm", "add_layer_norm_sum", "embed_layer_norm", "linear", "pool"),
    (torch.float32, *DTYPES),
)

# What an encoder may need and these kernels don't have, in the words of EncoderSpec.needs.
LACKING = frozenset({"rotary", "window_size", "relative_bias"})

# The numbers that csrc/dtype.h gives them.
_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_ACCESS_BYTES = 16
_INT32_MAX = 2**31 - 1


class UnalignedRowsError(ValueError):
    """Rows of heads begin between two accesses."""


class CudaKernels:
    """The ops of one extension module.

    Errors are ``ValueError`` for what the kernels can't do, and ``RuntimeError`` for a launch that
    failed, with the shape and CUDA's message.
    """

    def __init__(self, extension: ModuleType) -> None:
        self._extension = extension
        # The emulation wants to know what a kernel may touch.
        self._emulated = hasattr(extension, "allow")

    def add_layer_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        x_bias: Tensor | None,
    ) -> Tensor:
        return self._add_layer_norm(x, residual, weight, bias, eps, x_bias, None)

    def add_layer_norm_sum(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        x_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return self._add_layer_norm(x, residual, weight, bias, eps, x_bias, total), total

    def _add_layer_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        x_bias: Tensor | None,
        total: Tensor | None,
    ) -> Tensor:
        rows, width = x.shape
        out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
        self._call(
            "add_layer_norm",
            *self._rows(x),
            *self._rows(residual),
            *self._vector("x_bias", x_bias),
            *self._vector("weight", weight),
            *self._vector("bias", bias),
            self._address(out, written=True),
            0 if total is None else self._address(total, written=True),
            rows,
            width,
            eps,
            _NUMBERS[x.dtype],
            *_place(x),
        )
        return out

    def embed_layer_norm(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None,
        word: Tensor,
        position: Tensor | None,
        token_type: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        tokens, width = input_ids.shape[0], word.shape[1]
        out = torch.empty((tokens, width), dtype=word.dtype, device=word.device)
        self._call(
            "embed_layer_norm",
            *self._lookup(word, input_ids),
            *self._lookup(token_type, token_type_ids),
            *self._lookup(position, position_ids),
            *self._vector("weight", weight),
            *self._vector("bias", bias),
            self._address(out, written=True),
            tokens,
            width,
            eps,
            _NUMBERS[word.dtype],
            *_place(word),
        )
        return out

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        softmax_scale: float,
        window_size: int | None = None,
        relative_bias: Tensor | None = None,
    ) -> Tensor:
        if window_size is not None and window_size + 1 >= max_seqlen:
            window_size = None  # every sequence lies within it
        for name, value in (("window_size", window_size), ("relative_bias", relative_bias)):
            if value is not None:
                raise ValueError(f"backend 'cuda' attends without {name}; backend 'triton' has it")
        operands = {"q": q, "k": k, "v": v}
        return self._attend("attention", operands, None, cu_seqlens, max_seqlen, softmax_scale)

    def disentangled_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_key: Tensor | None,
        pos_query: Tensor | None,
        row_of_distance: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        softmax_scale: float,
    ) -> Tensor:
        if pos_key is None and pos_query is None:
            return self.attention(q, k, v, cu_seqlens, max_seqlen, softmax_scale)
        operands = {"q": q, "k": k, "v": v, "pos_key": pos_key, "pos_query": pos_query}
        return self._attend(
            "disentangled_attention",
            operands,
            row_of_distance,
            cu_seqlens,
            max_seqlen,
            softmax_scale,
        )

    def _attend(
        self,
        function: str,
        operands: Mapping[str, Tensor | None],
        row_of_distance: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        softmax_scale: float,
    ) -> Tensor:
        q = operands["q"]
        assert q is not None
        total, heads, head_size = q.shape
        if total > _INT32_MAX:
            raise ValueError(f"backend 'cuda' attends over 2**31 - 1 tokens at most, got {total}")
        batch = cu_seqlens.shape[0] - 1
        out = torch.empty((total, heads, head_size), dtype=q.dtype, device=q.device)
        if batch == 0 or out.numel() == 0:
            return out.zero_()
        longest = min(max_seqlen, total)
        workspace_bytes = self._extension.attention_workspace_bytes(total, batch, longest)
        workspace = torch.empty((1, workspace_bytes), dtype=torch.uint8, device=q.device)
        self._call(
            function,
            *(number for name, x in operands.items() for number in self._heads(name, x)),
            *self._distances(row_of_distance),
            self._address(out, written=True),
            self._address(cu_seqlens),
            self._address(workspace, written=True),
            total,
            batch,
            heads,
            head_size,
            longest,
            softmax_scale,
            _NUMBERS[q.dtype],
            *_place(q),
        )
        return out

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        return self.linear_prepared(x, PreparedLinear(weight, bias, weight.dtype), activation)

    def linear_prepared(
        self, x: Tensor, prepared: PreparedLinear, activation: Activation | None
    ) -> Tensor:
        if activation != "gelu":
            return linears.linear_prepared(x, prepared, activation)
        y = torch.mm(x, prepared.weight.t())
        return self._bias_gelu_(y, prepared.bias)

    def _bias_gelu_(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows, width = x.shape
        self._call(
            "bias_gelu",
            *self._rows(x),
            *self._vector("bias", bias),
            self._address(x, written=True),
            rows,
            width,
            _NUMBERS[x.dtype],
            *_place(x),
        )
        return x

    def feed_forward_prepared(
        self, x: Tensor, prepared: PreparedFeedForward, activation: Activation | None
    ) -> Tensor:
        if prepared.gated:
            return linears.feed_forward_prepared(x, prepared, activation)
        ((w_in, w_out),) = prepared.slices
        return self.linear_prepared(self.linear_prepared(x, w_in, activation), w_out, None)

    def _call(self, function: str, *arguments: int | float) -> None:
        try:
            getattr(self._extension, function)(*arguments)
        finally:
            if self._emulated:
                self._extension.forbid_all()

    # What the extension takes of an operand. An absent one has the address 0.

    def _address(self, tensor: Tensor, written: bool = False) -> int:
        address = tensor.data_ptr()
        if address == 0 and tensor.numel():
            raise ValueError(
                f"an operand of shape {tuple(tensor.shape)} has no memory: its storage was freed"
            )
        if self._emulated and tensor.numel():
            self._extension.allow(address, *_extent(tensor), written)
        return address

    def _rows(self, rows: Tensor | None) -> tuple[int, int]:
        """Address and row stride."""
        if rows is None:
            return 0, 0
        return self._address(rows), rows.stride(0)

    def _vector(self, name: str, vector: Tensor | None) -> tuple[int, int]:
        """Address and number of the dtype."""
        if vector is None:
            return 0, 0
        if vector.dtype not in _NUMBERS:
            known = ", ".join(map(str, _NUMBERS))
            raise ValueError(f"{name} must be one of {known}, got {vector.dtype}")
        return self._address(vector), _NUMBERS[vector.dtype]

    def _lookup(self, table: Tensor | None, ids: Tensor | None) -> tuple[int, int, int, int, bool]:
        """Address and row stride of the table, its rows, address of the ids, whether int64."""
        if table is None or ids is None:
            return 0, 0, 0, 0, False
        return (
            *self._rows(table),
            table.shape[0],
            self._address(ids),
            ids.dtype == torch.int64,
        )

    def _distances(self, row_of_distance: Tensor | None) -> tuple[int, ...]:
        """Address and reach, where the operation has them."""
        if row_of_distance is None:
            return ()
        return self._address(row_of_distance), row_of_distance.numel() // 2

    def _heads(self, name: str, heads: Tensor | None) -> tuple[int, int, int]:
        """Address, row stride and head stride of ``(total, H, D)``."""
        if heads is None:
            return 0, 0, 0
        # A dimension of one has any stride.
        row_stride, head_stride = (0 if heads.shape[i] == 1 else heads.stride(i) for i in range(2))
        for what, elements in (("row stride", row_stride), ("head stride", head_stride)):
            if elements * heads.element_size() % _ACCESS_BYTES:
                raise UnalignedRowsError(
                    f"backend 'cuda' reads {_ACCESS_BYTES} bytes at a time: {name}'s {what} must "
                    f"be a multiple of {_ACCESS_BYTES // heads.element_size()}, got {elements}"
                )
        address = self._address(heads)
        if address % _ACCESS_BYTES:
            raise UnalignedRowsError(
                f"backend 'cuda' reads {_ACCESS_BYTES} bytes at a time: {name} must begin at a "
                f"multiple of them, got address {address:#x}"
            )
        return address, row_stride, head_stride


def _place(like: Tensor) -> tuple[int, int]:
    """Device and stream, those that PyTorch would launch on."""
    if like.device.type != "cuda":
        return -1, 0
    return like.device.index, torch.cuda.current_stream(like.device).cuda_stream


def _extent(tensor: Tensor) -> tuple[int, int, int]:
    """Rows, bytes of a row and bytes from row to row of what a tensor covers.

    Columns, or heads that lie side by side, are one row; anything else is one row from the first
    element to the last.
    """
    size = tensor.element_size()
    inner, dense = 1, True
    for length, stride in zip(tensor.shape[:0:-1], tensor.stride()[:0:-1], strict=True):
        dense = dense and (length == 1 or stride == inner)
        inner *= length
    if tensor.dim() > 1 and dense:
        return tensor.shape[0], inner * size, tensor.stride(0) * size
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return 1, (last + 1) * size, 0
