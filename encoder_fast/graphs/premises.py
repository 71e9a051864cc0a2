"""What a recorded forward takes for granted beside weights and buffers: the numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encoder_fast.errors import UnsupportedModelError
from encoder_fast.families.origin import is_library_code
from encoder_fast.graphs.bucket import float32_precision, gemm_setting
from encoder_fast.looks import Watch
from encoder_fast.ops.linear import Activation
from encoder_fast.spec import EncoderSpec, SoftmaxAttention, epsilon


class Premises:
    """Those of one encoder. Its weights are watched by their
    :class:`~encoder_fast.weights.WeightCache`, its buffers by the reading of the model."""

    def __init__(self, spec: EncoderSpec, watch: Watch) -> None:
        """
        Args:
            watch: of the encoder's modules, looked at ahead of each call.

        Raises:
            UnsupportedModelError: an activation may do what can't be seen or recorded.
        """
        norms = [m for m in spec.tables_and_norms if not isinstance(m, nn.Embedding)]
        if spec.positions is not None and spec.positions.norm is not None:
            norms.append(spec.positions.norm)
        self._watch = watch
        self._norms = norms
        self._numbers: tuple[object, list[float]] | None = None
        attentions = [layer.attention for layer in spec.layers]
        self._attentions = [a for a in attentions if isinstance(a, SoftmaxAttention)]
        self._rotaries = list({a.rotary for a in self._attentions if a.rotary is not None})
        activations = [layer.activation for layer in spec.layers]
        if spec.convolution is not None:
            activations.append(spec.convolution.activation)
        for activation in activations:
            _check_recordable(activation)

    def buffers(self) -> list[Tensor]:
        """The buffers of the model that a forward reads."""
        return [getattr(rotary.module, rotary.buffer) for rotary in self._rotaries]

    def now(self) -> tuple:
        """What holds now; a forward recorded under an equal one is right."""
        return (
            self._numbers_of_modules(),
            float32_precision(),
            gemm_setting("allow_fp16_reduced_precision_reduction"),
            gemm_setting("allow_bf16_reduced_precision_reduction"),
            gemm_setting("allow_fp16_accumulation"),
            torch.are_deterministic_algorithms_enabled(),
        )

    def _numbers_of_modules(self) -> list[float]:
        known, mark = self._numbers, self._watch.mark
        if known is not None and known[0] is mark:
            return known[1]
        numbers = [epsilon(norm) for norm in self._norms]
        numbers += [attention.softmax_scale for attention in self._attentions]
        self._numbers = mark, numbers
        return numbers


def _check_recordable(activation: Activation) -> None:
    if isinstance(activation, str):
        return
    cls: Any = type(activation)
    if (
        isinstance(activation, nn.Module)
        and is_library_code(cls.forward)
        and not list(activation.parameters())
    ):
        return
    raise UnsupportedModelError(
        f"cuda_graphs=True, and an activation {cls.__module__}.{cls.__name__}, of which nobody "
        "knows whether it can be recorded"
    )
