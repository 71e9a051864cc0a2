"""The ops of the extension ``encoder_fast._cpu`` (``csrc/cpu/``): attention and LayerNorm on x86-64
with AVX2 or AVX-512, and the look at weights that each call begins with.

It is built where there is a C++ compiler, and links no torch: it takes addresses and believes what
it is told of them. So everything it relies on is checked here, but for what ``cu_seqlens`` holds;
and as the address 0 stands for what is left out, an operand whose storage was freed is refused.
Where the extension is missing, or has nothing for an operand, the CPU backend goes by PyTorch
alone, more slowly; :func:`why_not` says so.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from encoder_fast.backends.memory import checked_bounds

# What the instruction sets are called, in the order of csrc/cpu/kernels.h.
_NAMES = ("none", "AVX2", "AVX-512", "AVX-512 with bfloat16")

# The numbers that csrc/dtype.h gives them.
_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# A dot of float32 in one running sum is less exact than PyTorch's from some 200 terms on: over the
# parity rule at 240. Half precision rounds more coarsely than that.
_WIDEST_FLOATS, _WIDEST = 192, 1024

# Sums of places stay within 31 bits.
_MOST_TOKENS = 2**31 - 2**16

INTERFACE = 4
"""What the extension has under this name, if both are of the same sources."""

_LOG2_E = 1.4426950408889634


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        extension = importlib.import_module("encoder_fast._cpu")
    except ModuleNotFoundError:
        return None, (
            "the extension encoder_fast._cpu is not built; that takes a C++ compiler when "
            "encoder_fast is installed on x86-64, and with ENCODER_FAST_BUILD_CPU=1 it is an error "
            "to have none"
        )
    except ImportError as error:
        return None, f"the extension encoder_fast._cpu does not load: {error}"
    if getattr(extension, "INTERFACE", None) != INTERFACE:
        return None, (
            "the extension encoder_fast._cpu was built from other sources; install encoder_fast "
            "anew"
        )
    if extension.best_isa() == 0:
        return None, "this processor lacks AVX2, FMA or F16C"
    return extension, None


_extension, _reason = _load()
isa: int = 0 if _extension is None else _extension.best_isa()
"""The instruction set in use: a place in ``_NAMES``."""

_MAX_WIDTH: int = 0 if _extension is None else _extension.MAX_WIDTH


def why_not() -> str | None:
    """Why the CPU backend has no kernels of its own here; ``None`` where it has."""
    return _reason


def instructions() -> str:
    """The instruction set in use, for a reader."""
    return _NAMES[isa]


def _left_to_pytorch() -> tuple[torch.dtype, ...]:
    """The dtypes that PyTorch multiplies by AMX: 8 times as fast as AVX-512 by its peak rate."""
    return tuple(
        dtype
        for dtype, name in (
            (torch.bfloat16, "_is_amx_tile_supported"),
            (torch.float16, "_is_amx_fp16_supported"),
        )
        if getattr(torch.cpu, name, lambda: False)()
    )


_LEFT_TO_PYTORCH = _left_to_pytorch()


def _have_addresses(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors with memory of their own, and nobody traces them."""
    # A loop by hand: a generator takes as long as the smallest kernels.
    for t in tensors:
        if t is not None and (
            type(t) not in (Tensor, Parameter) or t.is_neg() or t._is_zerotensor()
        ):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )


def _no_address(tensor: Tensor) -> int:
    """The address of a tensor whose ``data_ptr()`` is 0: the same, if it has no element.

    Raises:
        ValueError: its storage was freed.
    """
    if tensor.numel():
        raise ValueError(
            f"an operand of shape {tuple(tensor.shape)} has no memory: its storage was freed"
        )
    return 0


def attends(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, relative_bias: Tensor | None
) -> bool:
    """Whether :func:`attention` runs these operands; PyTorch complains of bad ones."""
    total, num_heads, head_size = q.shape
    return (
        isa > 0
        and _have_addresses(q, k, v, cu_seqlens, relative_bias)
        and q.dtype in _NUMBERS
        and q.dtype not in _LEFT_TO_PYTORCH
        and q.dtype == k.dtype == v.dtype
        and q.shape == k.shape == v.shape
        and cu_seqlens.dtype == torch.int32
        and cu_seqlens.is_contiguous()
        and (relative_bias is None or relative_bias.shape[0] == num_heads)
        and head_size % 16 == 0
        and 0 < head_size <= (_WIDEST_FLOATS if q.dtype == torch.float32 else _WIDEST)
        and total <= _MOST_TOKENS
        and q.stride(2) == k.stride(2) == v.stride(2) == 1
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    window_size: int | None,
    relative_bias: Tensor | None,
) -> Tensor:
    """The op, for what :func:`attends` has let pass."""
    assert _extension is not None
    total, num_heads, head_size = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if num_heads == 0:
        return out
    max_seqlen = min(max_seqlen, total)
    bias = None
    if relative_bias is not None:
        bias = by_distance(relative_bias.float() * _LOG2_E, max(1, max_seqlen))
        bias = F.pad(bias, (0, _extension.BIAS_BEYOND))
    threads = torch.get_num_threads()
    floats = threads * _extension.attention_workspace(head_size)
    workspace = torch.empty(floats, dtype=torch.float32, device=q.device)
    fits = _extension.attention(
        *(q.data_ptr() or _no_address(q), q.stride(0), q.stride(1)),
        *(k.data_ptr() or _no_address(k), k.stride(0), k.stride(1)),
        *(v.data_ptr() or _no_address(v), v.stride(0), v.stride(1)),
        out.data_ptr(),
        cu_seqlens.data_ptr() or _no_address(cu_seqlens),
        total,
        cu_seqlens.numel() - 1,
        max_seqlen,
        num_heads,
        head_size,
        softmax_scale,
        # no distance is larger than total
        -1 if window_size is None else min(window_size, total),
        *((0, 0) if bias is None else (bias.data_ptr(), bias.stride(0))),
        workspace.data_ptr(),
        _NUMBERS[q.dtype],
        isa,
        threads,
    )
    if not fits:
        checked_bounds(cu_seqlens, total, max_seqlen)
        raise ValueError("cu_seqlens was written while it was read")
    return out


def by_distance(relative_bias: Tensor, longest: int) -> Tensor:
    """``(H, 2 · longest - 1)``: the bias of each distance from ``1 - longest`` on."""
    reach = relative_bias.shape[1] // 2
    distances = torch.arange(1 - longest, longest, device=relative_bias.device)
    return relative_bias.index_select(1, distances.clamp_(-reach, reach).add_(reach))


def normalises(x: Tensor, residual: Tensor | None, *vectors: Tensor | None) -> bool:
    """Whether :func:`add_layer_norm` runs these operands; PyTorch complains of bad ones."""
    if isa == 0 or not _have_addresses(x, residual, *vectors):
        return False
    shape, dtype = x.shape, x.dtype
    if dtype not in _NUMBERS or shape[1] % 16 or not 0 < shape[1] <= _MAX_WIDTH:
        return False
    if not x.is_contiguous():
        return False
    if residual is not None and not _is_like(residual, shape, dtype):
        return False
    vector = shape[1:]
    return all([t is None or _is_like(t, vector, dtype) for t in vectors])


def _is_like(t: Tensor, shape: torch.Size, dtype: torch.dtype) -> bool:
    return t.dtype == dtype and t.shape == shape and t.is_contiguous()


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
    total: Tensor | None = None,
) -> Tensor:
    """The op, for what :func:`normalises` has let pass; the sum goes to ``total``."""
    assert _extension is not None
    rows, width = x.shape
    out = torch.empty_like(x)
    _extension.add_layer_norm(
        x.data_ptr() or _no_address(x),
        *(
            0 if t is None else t.data_ptr() or _no_address(t)
            for t in (residual, x_bias, weight, bias)
        ),
        out.data_ptr(),
        0 if total is None else total.data_ptr(),
        rows,
        width,
        eps,
        _NUMBERS[x.dtype],
        isa,
        torch.get_num_threads(),
    )
    return out


def compares_bytes() -> bool:
    """Whether :func:`same_bytes` runs here and now."""
    return isa > 0 and _have_addresses()


def same_bytes(places: Tensor, expected: Tensor) -> bool:
    """Whether memory still holds what it held. Gathering some 300 runs of a cache line each by
    ``torch.cat`` takes 4% of a forward of MiniLM over one short text.

    Args:
        places: int64 ``(R, 2)``, the address and the bytes of each run. Its memory must be alive.
        expected: the runs' bytes, one after another, in any dtype.
    """
    assert _extension is not None
    return _extension.same_bytes(places.data_ptr(), len(places), expected.data_ptr())
