"""Proof that a patched model gives the original's numbers.

The rule, in any dtype and on the real tokens alone::

    error(patched) <= 2 · error(original eager) + floor

Both errors are differences from the same model run in float64: the root mean square over a token's
features, of the token that is worst. (One wrong token shows, as it would not in the mean of all;
and two runs that are equally exact come out nearly equal, where chance alone can set their single
largest elements apart by a factor of 3.) The floor is one rounding step of the
dtype at the largest value. The original's own error is the unit: a patched model is right when it
is as near to the exact result as the original is, an idea of FlashAttention's tests
(https://github.com/Dao-AILab/flash-attention).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from encoder_fast.errors import ParityError
from encoder_fast.patching import patched, report, unpatch
from encoder_fast.patching.locate import STATE, root_module
from encoder_fast.patching.state import EncoderState

FACTOR = 2.0
"""How many times the original's own error a patched model may be off."""


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One output of the model.

    Attributes:
        name: which output, ``hidden_states[3]`` for the third layer's.
        error: difference of the patched output from float64, of the worst token.
        original_error: the same for the original, eager, in the model's dtype.
        floor: one rounding step of the dtype at the largest value.
    """

    name: str
    error: float
    original_error: float
    floor: float

    @property
    def allowed(self) -> float:
        """The largest error that the rule lets pass."""
        return FACTOR * self.original_error + self.floor

    @property
    def ok(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.allowed

    @property
    def ratio(self) -> float:
        """The error in units of the original's own; 1 is as good as the original."""
        if self.original_error == 0:
            return 0.0 if self.error == 0 else float("inf")
        return self.error / self.original_error


@dataclass(frozen=True, slots=True)
class ParityReport:
    """What :func:`check_parity` returns; ``print`` it.

    Attributes:
        rows: one for each output tensor.
        dtype: the model's.
        backend: the backend that ran.
        fallbacks: why calls ran the original forward, if they did: nothing was proved then.
    """

    rows: tuple[ParityRow, ...]
    dtype: torch.dtype
    backend: str
    fallbacks: dict[str, int]

    @property
    def ok(self) -> bool:
        return not self.fallbacks and bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def worst_ratio(self) -> float:
        return max((row.ratio for row in self.rows), default=float("inf"))

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=4)
        lines = [
            f"parity in {self.dtype} on backend {self.backend}, errors against float64",
            f"{'output':<{width}}  {'patched':>9}  {'original':>9}  {'ratio':>5}",
        ]
        for row in self.rows:
            verdict = "" if row.ok else "  BROKEN"
            lines.append(
                f"{row.name:<{width}}  {row.error:9.2e}  {row.original_error:9.2e}  "
                f"{row.ratio:5.2f}{verdict}"
            )
        for reason, count in self.fallbacks.items():
            lines.append(f"NOT PROVED: {count} x ran the original forward: {reason}")
        return "\n".join(lines)


def compare(
    name: str, output: Tensor, original: Tensor, reference: Tensor, valid: Tensor | None = None
) -> ParityRow:
    """Apply the rule to one tensor.

    Args:
        output: what is tested, in the model's dtype.
        original: the original eager result in that dtype.
        reference: the float64 result.
        valid: boolean mask of the leading dimensions; all elements where it is ``None``.
    """
    if valid is not None:
        output, original, reference = output[valid], original[valid], reference[valid]
    if output.shape != reference.shape:
        raise ValueError(f"{name} has shape {tuple(output.shape)}, not {tuple(reference.shape)}")
    if reference.numel() == 0:
        return ParityRow(name, 0.0, 0.0, 0.0)
    exact = reference.double()
    floor = torch.finfo(output.dtype).eps * exact.abs().max().item()
    return ParityRow(name, _worst(output, exact), _worst(original, exact), floor)


def _worst(output: Tensor, exact: Tensor) -> float:
    """The largest root mean square difference of any vector along the last dimension."""
    squares = (output.double() - exact).square()
    if squares.dim() > 1:
        squares = squares.mean(dim=-1)
    return squares.max().sqrt().item()


def check_parity(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    backend: str = "auto",
    raise_on_failure: bool = False,
) -> ParityReport:
    """Run a model patched, original and in float64 on the same inputs, and compare every output.

    Args:
        model: patched or not; it comes back as it was. It must be in eval mode. A float64 copy is
            made on its device, so twice to four times its memory is needed.
        inputs: the keyword arguments of one call, as from a tokenizer.
        backend: where the model is not patched, the backend to patch it with.
        raise_on_failure: raise instead of returning a report that is not ``ok``.

    Returns:
        A :class:`ParityReport`: the hidden states of each layer and every other output.

    Raises:
        ParityError: the rule is broken or the call fell back, and ``raise_on_failure`` is set.
        ValueError: the model is in training mode.
        TypeError: the model is a container without a config, whose calls have another form, or
            ``inputs`` are no mapping.
        UnsupportedModelError: the model has no fast path.
    """
    module = root_module(model)
    if module.training:
        raise ValueError("check_parity needs the model in eval mode: call model.eval()")
    if not hasattr(module, "config"):
        raise TypeError(
            f"check_parity calls a transformers model; give it the one inside the "
            f"{type(module).__name__}"
        )
    if not isinstance(inputs, Mapping):
        raise TypeError(
            "inputs must be a call's arguments by name, as from a tokenizer with "
            f"return_tensors='pt'; got a {type(inputs).__name__}"
        )
    call = {**inputs, "output_hidden_states": True, "return_dict": True}
    states = [
        state
        for state in (child.__dict__.get(STATE) for child in module.modules())
        if isinstance(state, EncoderState)
    ]
    with torch.inference_mode(), nullcontext() if states else patched(module, backend):
        before = report(module).fallbacks
        with _not_strict(states):
            output = module(**call)
        after = report(module)
    fallbacks = {reason: n - before.get(reason, 0) for reason, n in after.fallbacks.items()}
    with torch.inference_mode():
        twin = _copy(module, "eager")
        dtype = next(module.parameters()).dtype
        original = twin(**call, output_attentions=True)
        wide = {k: v.double() if _is_float(v) else v for k, v in call.items()}
        # Not the eager one: ModernBERT's takes the softmax in float32 whatever it is given, where
        # the mask of float64 is -inf and a padding token that sees nothing becomes NaN.
        reference = _copy(module, "sdpa").double()(**wide)
    mask = inputs.get("attention_mask")
    by_token = _one_value_a_token(module)
    rows = tuple(_compare_outputs(output, original, reference, mask, by_token))
    result = ParityReport(
        rows=rows,
        dtype=dtype,
        backend=", ".join(sorted({encoder.backend for encoder in after.encoders})),
        fallbacks={reason: count for reason, count in fallbacks.items() if count},
    )
    if raise_on_failure and not result.ok:
        raise ParityError(str(result))
    return result


@contextmanager
def _not_strict(states: list[EncoderState]) -> Iterator[None]:
    """A strict model would raise where the report is to say why nothing was proved."""
    before = [state.strict for state in states]
    for state in states:
        state.strict = False
    try:
        yield
    finally:
        for state, strict in zip(states, before, strict=True):
            state.strict = strict


def _one_value_a_token(module: nn.Module) -> tuple[str, ...]:
    """The outputs of shape ``(B, S)``: by shape alone they could be ``(B, labels)``."""
    replaced_tokens = type(module).__name__ == "ElectraForPreTraining"
    return ("start_logits", "end_logits", *(("logits",) if replaced_tokens else ()))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _copy(module: nn.Module, attention: str) -> nn.Module:
    """An unpatched copy whose attention is the one asked for, where it has that.

    transformers 5 reads the implementation from the config; 4 chooses a class when the model is
    built, and that class runs eager where attentions are asked for, as the caller does.
    """
    twin = unpatch(copy.deepcopy(module))
    for child in twin.modules():
        config: Any = getattr(child, "config", None)
        if getattr(config, "_attn_implementation", None) is not None and (
            attention != "sdpa" or getattr(child, "_supports_sdpa", False)
        ):
            config._attn_implementation = attention
    return twin


def _compare_outputs(
    output: Mapping[str, Any],
    original: Mapping[str, Any],
    reference: Mapping[str, Any],
    mask: Tensor | None,
    by_token: tuple[str, ...],
) -> Iterator[ParityRow]:
    for name, expected in reference.items():
        if "attentions" in name or name not in output:
            continue
        pairs = [(name, output[name], original[name], expected)]
        if isinstance(expected, tuple):
            pairs = [
                (f"{name}[{i}]", *states)
                for i, states in enumerate(zip(output[name], original[name], expected, strict=True))
            ]
        for label, ours, theirs, exact in pairs:
            if _is_float(exact):
                yield compare(label, ours, theirs, exact, _valid(exact, mask, name in by_token))


def _valid(tensor: Tensor, mask: Tensor | None, one_value_a_token: bool) -> Tensor | None:
    """The real tokens, or the rows that have one, by what the tensor has a value for."""
    if mask is None or tensor.dim() == 0:
        return None
    # multiple choice brings (B, choices, S) in and runs B · choices rows
    tokens = mask.bool().flatten(0, -2)
    if tensor.shape[:2] == tokens.shape and (tensor.dim() > 2 or one_value_a_token):
        return tokens
    rows = mask.bool().any(dim=-1)
    return rows if tensor.shape[: rows.dim()] == rows.shape else None
