"""The CUDA backend: the project's own CUDA C++ (``csrc/``) on NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import importlib
import importlib.util

from encoder_fast.backends.cuda_kernels import (
    DTYPES,
    DTYPES_OF_OP,
    HEAD_SIZES,
    HEAD_SIZES_OF_OP,
    LACKING,
    MAX_WIDTH,
    CudaKernels,
)
from encoder_fast.backends.linears import prepare_feed_forward, prepare_linear
from encoder_fast.backends.pooling import pool

# The mask is nothing that CUDA C++ would read faster, so Triton's kernels do for this backend too.
# It runs without Triton, which it needs for nothing else.
if importlib.util.find_spec("triton") is None:
    from encoder_fast.backends.masks import count_tokens, place_tokens
else:
    from encoder_fast.kernels.pack_mask import count_tokens, place_tokens

__all__ = [
    "DTYPES",
    "DTYPES_OF_OP",
    "HEAD_SIZES",
    "HEAD_SIZES_OF_OP",
    "LACKING",
    "MAX_WIDTH",
    "add_layer_norm",
    "add_layer_norm_sum",
    "attention",
    "count_tokens",
    "disentangled_attention",
    "embed_layer_norm",
    "feed_forward_prepared",
    "linear",
    "linear_prepared",
    "place_tokens",
    "pool",
    "prepare_feed_forward",
    "prepare_linear",
]

# No op waits for the device or asks it anything, so that CUDA graphs can be recorded.
RECORDABLE = True

_kernels = CudaKernels(importlib.import_module("encoder_fast._cuda"))

add_layer_norm = _kernels.add_layer_norm
add_layer_norm_sum = _kernels.add_layer_norm_sum
attention = _kernels.attention
disentangled_attention = _kernels.disentangled_attention
embed_layer_norm = _kernels.embed_layer_norm
feed_forward_prepared = _kernels.feed_forward_prepared
linear = _kernels.linear
linear_prepared = _kernels.linear_prepared
