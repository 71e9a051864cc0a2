"""Whatever is done to a patched model, in whatever order: it gives what an unpatched twin gives."""

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from berts import inputs, tiny
from torch import Tensor, nn

import encoder_fast
from encoder_fast.parity import compare

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st


def _load(model: nn.Module) -> None:
    model.load_state_dict({key: value * 1.1 for key, value in model.state_dict().items()})


def _load_and_assign(model: nn.Module) -> None:
    state = {key: value * 0.9 for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _edit(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)


def _replace_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.95


def _half_more(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * 1.5


def _hook(model: Any) -> None:
    model.bert.encoder.layer[0].output.dense.register_forward_hook(_half_more)


def _unhook(model: Any) -> None:
    model.bert.encoder.layer[0].output.dense._forward_hooks.clear()


def _adapt(model: Any) -> None:
    """Put an adapter around a linear, or take it away again."""
    output = model.bert.encoder.layer[0].output
    adapted = isinstance(output.dense, nn.Sequential)
    output.dense = output.dense[0] if adapted else nn.Sequential(output.dense, nn.ReLU()).eval()


def _replace_a_linear(model: Any) -> None:
    attention = model.bert.encoder.layer[-1].attention.self
    attention.query = copy.deepcopy(attention.key)


def _drop_a_layer(model: Any) -> None:
    if len(model.bert.encoder.layer) > 1:
        del model.bert.encoder.layer[-1]
        model.config.num_hidden_layers -= 1


# Done to the model and to its twin. Those that return something return the model to go on with.
TO_BOTH: dict[str, Callable[[Any], Any]] = {
    "load": _load,
    "load and assign": _load_and_assign,
    "edit": _edit,
    "replace data": _replace_data,
    "bfloat16": lambda model: model.bfloat16(),
    "float": lambda model: model.float(),
    "deepcopy": copy.deepcopy,
    "train and eval": lambda model: model.train().eval(),
    "eager": lambda model: model.set_attn_implementation("eager"),
    "hook": _hook,
    "unhook": _unhook,
    "adapt": _adapt,
    "replace a linear": _replace_a_linear,
    "drop a layer": _drop_a_layer,
}

# Done to the model alone.
TO_OURS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "patch": encoder_fast.patch,
    "unpatch": encoder_fast.unpatch,
    "reference": lambda model: encoder_fast.patch(model, "reference"),
}


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(names=st.lists(st.sampled_from([*TO_BOTH, *TO_OURS]), min_size=2, max_size=6))
def test_life_cycle(names: list[str]) -> None:
    twin: Any = tiny("BertForTokenClassification")
    model: Any = encoder_fast.patch(copy.deepcopy(twin))
    call = inputs("right")
    for name in names:
        if name in TO_BOTH:
            model = TO_BOTH[name](model) or model
            twin = TO_BOTH[name](twin) or twin
        else:
            # an adapter is a reason to refuse
            with contextlib.suppress(encoder_fast.UnsupportedModelError):
                model = TO_OURS[name](model)
        with torch.inference_mode():
            ours, theirs = model(**call).logits, twin(**call).logits
            exact = copy.deepcopy(twin).double()(**call).logits
        row = compare(name, ours, theirs, exact, call["attention_mask"].bool())
        assert row.ok, row
