"""The sizes that a recorded forward is for, and up to which size recording one is worth it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from encoder_fast.packing import PackedBatch
from encoder_fast.spec import EncoderSpec

# Below 128 tokens a step is one of these: a GEMM's tile has at least as many rows.
_TOKEN_STEP = 16

# Where attention kernels of the shortest sequences begin.
_SHORTEST = 16

# What the host takes for a layer: five operations of PyTorch's (four GEMMs, an activation) at 5 us,
# and three launches of Triton's (attention, two norms) at 14 us, as measured of the launchers on a
# CPU with a driver that launches nothing.
_HOST_SECONDS = 67e-6

# Operations a second on large matrices, of an H200: half precision as measured (769 to 798
# TFLOP/s), TF32 as half of that, float32 near its peak of 67.
_HALF_RATE, _TF32_RATE, _FLOAT32_RATE = 780e12, 390e12, 60e12


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes that a batch is rounded up to.

    Attributes:
        total: tokens; at most an eighth more than there are, from 128 on.
        batch_size: sequences, a power of two: one without a token costs programs that end at once.
        max_seqlen: the longest sequence, a power of two, as the attention kernels' own length
            classes are. What it adds to their grids are programs that end at once.
    """

    total: int
    batch_size: int
    max_seqlen: int

    @classmethod
    def of(cls, batch: PackedBatch) -> Bucket:
        """The smallest that holds a batch of at least one token."""
        return cls(
            _next_total(batch.total),
            _next_power_of_two(batch.batch_size),
            max(_SHORTEST, _next_power_of_two(batch.max_seqlen)),
        )


def _next_total(total: int) -> int:
    # Eight steps from a power of two to the next.
    step = max(_TOKEN_STEP, 1 << (total.bit_length() - 4) if total >= 8 else 0)
    return -(-total // step) * step


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def linear_parameters(spec: EncoderSpec) -> float:
    """The weights of a layer's GEMMs, averaged over the layers."""
    sizes = [
        module.weight.numel()
        for layer in spec.layers
        for module in (*layer.projections, layer.attention_out, layer.ffn_in, layer.ffn_out)
    ]
    return sum(sizes) / max(1, len(spec.layers))


def most_tokens(parameters: float, dtype: torch.dtype) -> int:
    """The tokens up to which launching a layer's kernels takes the host longer than running its
    GEMMs takes the GPU, by computation for an H200.

    With more of them the host is ahead, and a graph would save nothing: half precision BERT-base
    comes to 3,691 tokens, BERT-large to 2,076, MiniLM to 14,767.

    Args:
        parameters: of a layer, as :func:`linear_parameters` counts them.
    """
    rate = _HALF_RATE
    if dtype == torch.float32:
        exact = float32_precision() in ("highest", "ieee", "none")
        rate = _FLOAT32_RATE if exact else _TF32_RATE
    return _tokens_at(rate, parameters)


def fewest_tokens(parameters: float) -> int:
    """What :func:`most_tokens` gives at least, whatever the dtype and PyTorch's settings."""
    return _tokens_at(_FLOAT32_RATE, parameters)


def _tokens_at(rate: float, parameters: float) -> int:
    return int(_HOST_SECONDS * rate / (2 * max(1.0, parameters)))


def float32_precision() -> str:
    """PyTorch's setting for float32 matrices on a GPU."""
    # Where the newer one was set, reading the older one is an error; PyTorch 2.8 has that alone.
    try:
        return gemm_setting("fp32_precision")
    except AttributeError:
        return torch.get_float32_matmul_precision()


def gemm_setting(name: str) -> Any:
    """What ``torch.backends.cuda.matmul`` has under a name.

    Raises:
        AttributeError: this PyTorch has no such setting.
    """
    # A plain attribute access fails first and then comes here; that takes four times as long.
    return torch.backends.cuda.matmul.__getattr__(name)
