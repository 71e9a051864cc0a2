"""Makes Triton's interpreter compute what the GPU would, with the NumPy that is installed.

Four of its habits would fail a correct kernel:

- Every scalar is an array of one element, and a loop bound that a kernel loaded or computed becomes
  a Python integer through `int(array)`. NumPy 2.4 made that an error for arrays with a dimension.
  Triton takes care of it from 3.9 on.
- bfloat16 is kept as its 16 bits in an unsigned integer, and `tl.dot` multiplies those integers.
- float32 is cast to bfloat16 by dropping the lower bits, where the GPU rounds to nearest even.
- `tl.fma` rounds the product before it adds.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def repair_interpreter() -> None:
    """Put the four right. Calling it again changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    builder.repaired = True

    patch_tensor, dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def patch_tensor_and_index(tensor: Any, *arguments: Any) -> None:
        patch_tensor(tensor, *arguments)
        # Triton itself puts the attribute back when the kernel is done.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def as_float32(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_widen(handle.data), tl.float32)

    def dot_of_floats(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return dot(self, as_float32(a), as_float32(b), *arguments)

    def cast_to_nearest(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_round_to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, dtype)

    def fused_multiply_add(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter._patch_lang_tensor = patch_tensor_and_index
    builder.create_dot = dot_of_floats
    builder.cast_impl = cast_to_nearest
    builder.create_fma = fused_multiply_add


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    # Rounding up a NaN's payload could carry into infinity.
    return np.where(np.isnan(values), np.uint32(0x7FC0), nearest).astype(np.uint16)
