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

An output of a few numbers needs more than one input: of one or two numbers, the original's error is
small by luck now and then. Where such an output seems broken, it is judged over further inputs.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from encoder_fast.errors import ParityError
from encoder_fast.families import find_family
from encoder_fast.patching import patched, report, unpatch
from encoder_fast.patching.locate import STATE, root_module
from encoder_fast.patching.state import EncoderState

FACTOR = 2.0
"""How many times the original's own error a patched model may be off."""

ENOUGH = 1024
"""Of so many numbers the original's error is not small by luck."""

MORE_INPUTS = (8, 64)
"""Over how many further inputs an output of fewer is judged, the second only where the first finds
it broken."""


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One output of the model.

    Attributes:
        name: which output, ``hidden_states[3]`` for the third layer's.
        error: difference of the patched output from float64, of the worst token.
        original_error: the same for the original, eager, in the model's dtype.
        floor: one rounding step of the dtype at the largest value.
        inputs: over how many inputs it was judged.
    """

    name: str
    error: float
    original_error: float
    floor: float
    inputs: int = 1

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
            if row.inputs > 1:
                verdict += f"  (over {row.inputs} inputs)"
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
        ValueError: the model is in training mode, returns no tensors, or nobody can tell which
            tokens of its outputs are real.
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
    states = [
        state
        for state in (child.__dict__.get(STATE) for child in module.modules())
        if isinstance(state, EncoderState)
    ]
    with (
        torch.inference_mode(),
        nullcontext() if states else patched(module, backend),
        _not_strict(states),
    ):
        before = report(module).fallbacks
        models = _Models(module)
        triples = models.run(inputs)
        after = report(module)
        rows = _judge(models, inputs, triples)
    fallbacks = {reason: n - before.get(reason, 0) for reason, n in after.fallbacks.items()}
    result = ParityReport(
        rows=rows,
        dtype=next(module.parameters()).dtype,
        backend=", ".join(sorted({encoder.backend for encoder in after.encoders})),
        fallbacks={reason: count for reason, count in fallbacks.items() if count},
    )
    if raise_on_failure and not result.ok:
        raise ParityError(str(result))
    return result


@dataclass(frozen=True, slots=True)
class _Triple:
    """One output, at what is real of it: patched, original, and in float64."""

    ours: Tensor
    theirs: Tensor
    exact: Tensor


class _Models:
    """A patched model, the original and one in float64, to be run on the same inputs."""

    def __init__(self, module: nn.Module) -> None:
        self.patched = module
        self.original = _copy(module, "eager")
        # Not the eager one: ModernBERT's takes the softmax in float32 whatever it is given, where
        # the mask of float64 is -inf and a padding token that sees nothing becomes NaN.
        self.wide = _copy(module, "sdpa").double()
        self.encoders: list[Any] = [
            child for child in self.original.modules() if find_family(type(child)) is not None
        ]
        self._masks: list[Tensor] = []
        for encoder in self.encoders:
            encoder.register_forward_pre_hook(self._hear, with_kwargs=True)
        self._one_value_a_token = _one_value_a_token(module)

    def _hear(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Which tokens are real, an encoder is told: a model may put virtual tokens in front."""
        given = inspect.signature(encoder.forward).bind_partial(*args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        source = given.get("input_ids")
        source = given.get("inputs_embeds") if source is None else source
        mask = given.get("attention_mask")
        if mask is None and source is not None:
            mask = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)
        if mask is not None and mask.dim() == 2:
            self._masks.append(mask.bool())

    def run(self, inputs: Mapping[str, Any]) -> dict[str, _Triple]:
        """Every output of the three by name.

        Raises:
            ValueError: nobody can tell which tokens of an output are real, or the model returns
                something else than tensors.
        """
        call = {**inputs, **self._flags("output_hidden_states", "return_dict")}
        wide = {k: v.double() if _is_float(v) else v for k, v in call.items()}
        self._masks.clear()
        given = inputs.get("attention_mask")
        outputs = [
            _by_name(output)
            for output in (
                self.patched(**call),
                self.original(**call, **self._flags("output_attentions")),
                self.wide(**wide),
            )
        ]
        ours, theirs, exact = outputs
        found = {}
        for name, expected in exact.items():
            if "attentions" in name or name not in ours or not _is_float(expected):
                continue
            tensors = ours[name], theirs[name], expected
            valid = self._valid(name, expected, given)
            if valid is not None:
                tensors = tuple(tensor[valid] for tensor in tensors)
            found[name] = _Triple(*(torch.atleast_1d(tensor) for tensor in tensors))
        return found

    def _flags(self, *names: str) -> dict[str, bool]:
        """Those that a wrapper of the user's own takes."""
        parameters = inspect.signature(self.patched.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return {name: True for name in names if takes_any or name in parameters}

    def _valid(self, name: str, tensor: Tensor, given: Tensor | None) -> Tensor | None:
        """The real tokens, or the rows that have one, by what the tensor has a value for."""
        if tensor.dim() == 0:
            return None
        # multiple choice brings (B, choices, S) in and runs B · choices rows
        masks = self._masks + ([] if given is None else [given.bool().flatten(0, -2)])
        if tensor.dim() > 2 or name in self._one_value_a_token:
            heard = [mask for mask in self._masks if mask.shape == tensor.shape[:2]]
            if any(not torch.equal(mask, heard[0]) for mask in heard):
                raise ValueError(
                    f"the encoders in the model get different masks of shape "
                    f"{tuple(heard[0].shape)}, and check_parity can't tell which tokens of {name} "
                    "are real; check the encoders one by one"
                )
            fitting = heard or [mask for mask in masks if mask.shape == tensor.shape[:2]]
            if fitting:
                return fitting[0]
            if "hidden_state" in name and self._masks:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, and no attention_mask is of shape "
                    f"{tuple(tensor.shape[:2])}: check_parity can't tell which tokens are real"
                )
        for mask in masks if given is None else [given.bool(), *masks]:
            rows = mask.any(dim=-1)
            if tensor.shape[: rows.dim()] == rows.shape:
                return rows
        return None


def _by_name(output: Any) -> dict[str, Any]:
    """What a model returns, tuples taken apart."""
    if isinstance(output, Tensor | tuple | list):
        output = {"output": tuple(output) if isinstance(output, list) else output}
    if not isinstance(output, Mapping):
        raise ValueError(
            f"check_parity compares tensors; the model returns a {type(output).__name__}"
        )
    found: dict[str, Any] = {}
    for name, value in output.items():
        if isinstance(value, tuple):
            found.update({f"{name}[{i}]": one for i, one in enumerate(value)})
        else:
            found[name] = value
    return found


def _judge(
    models: _Models, inputs: Mapping[str, Any], triples: dict[str, _Triple]
) -> tuple[ParityRow, ...]:
    """A row for each output; those of few numbers that seem broken are judged over more inputs."""
    rows = {name: compare(name, t.ours, t.theirs, t.exact) for name, t in triples.items()}
    if any(not row.ok and _is_sure(row, triples[name]) for name, row in rows.items()):
        return tuple(rows.values())
    others = _other_inputs(models.encoders, inputs)
    runs = [triples]
    for count in MORE_INPUTS:
        doubted = [name for name, row in rows.items() if not row.ok]
        if not doubted or others is None:
            break
        runs += [models.run(next(others)) for _ in range(1 + count - len(runs))]
        rows.update({name: _compare_all(name, [run[name] for run in runs]) for name in doubted})
    return tuple(rows.values())


def _is_sure(row: ParityRow, triple: _Triple) -> bool:
    return triple.exact.numel() >= ENOUGH or not math.isfinite(row.error)


def _compare_all(name: str, triples: list[_Triple]) -> ParityRow:
    """One output over several inputs, by the worse of two rules.

    Over all inputs together the root mean square must keep to the usual bound. That of the first
    input alone may not stand out of the worst that the original does in any: a fault that shows in
    one text would be lost among so many.
    """
    ours, theirs, exact = (
        torch.cat([getattr(triple, which).double() for triple in triples])
        for which in ("ours", "theirs", "exact")
    )
    first, count = triples[0], len(triples)
    floor = torch.finfo(first.ours.dtype).eps * exact.abs().max().item()
    typical = [(output - exact).square().mean().sqrt().item() for output in (ours, theirs)]
    alone = [_worst(first.ours, first.exact.double()), _worst(theirs, exact)]
    return max(
        (ParityRow(name, mine, its, floor, count) for mine, its in (typical, alone)),
        key=lambda row: row.error / row.allowed if row.allowed else row.error,
    )


def _other_inputs(encoders: list[Any], inputs: Mapping[str, Any]) -> Iterator[dict] | None:
    """The same call over other tokens, as often as it is asked for; ``None`` without any."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is None and not _is_float(embeds):
        return None
    table = encoders[0].get_input_embeddings()
    return _drawn(inputs, ids, embeds, table.num_embeddings, encoders[0].config.pad_token_id)


def _drawn(
    inputs: Mapping[str, Any], ids: Any, embeds: Any, words: int, padding: int | None
) -> Iterator[dict]:
    generator = torch.Generator().manual_seed(0)
    while True:
        if ids is None:
            noise = torch.randn(embeds.shape, generator=generator).to(embeds)
            yield {**inputs, "inputs_embeds": noise * embeds.std()}
            continue
        drawn = torch.randint(words, ids.shape, generator=generator).to(ids)
        # RoBERTa's positions go by where the padding ids are, so these stay.
        kept = (drawn == padding) | (ids == padding)
        yield {**inputs, "input_ids": torch.where(kept, ids, drawn)}


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
    replaced_tokens = any(type(m).__name__ == "ElectraForPreTraining" for m in module.modules())
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
