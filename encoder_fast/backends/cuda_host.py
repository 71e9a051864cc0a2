"""The CUDA backend over an emulated GPU, on CPU tensors: for tests alone.

Its extension is the same C++ compiled for the CPU; ``tests/cuda_host_build.py`` builds it.
"""

from __future__ import annotations

import importlib

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
from encoder_fast.backends.masks import count_tokens, place_tokens
from encoder_fast.backends.pooling import pool

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

_kernels = CudaKernels(importlib.import_module("_cuda_host"))

add_layer_norm = _kernels.add_layer_norm
add_layer_norm_sum = _kernels.add_layer_norm_sum
attention = _kernels.attention
disentangled_attention = _kernels.disentangled_attention
embed_layer_norm = _kernels.embed_layer_norm
feed_forward_prepared = _kernels.feed_forward_prepared
linear = _kernels.linear
linear_prepared = _kernels.linear_prepared
