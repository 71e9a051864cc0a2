"""Whether oneDNN computes here, and in which dtypes."""

from __future__ import annotations

import torch


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this processor and this build of PyTorch have oneDNN's linear in ``dtype``."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32
