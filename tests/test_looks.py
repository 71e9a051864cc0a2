"""What each call looks at in modules and weights: changes show, in C++ and in Python."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from berts import tiny
from torch import Tensor, nn

from encoder_fast import looks
from encoder_fast.errors import NotFastError
from encoder_fast.patching.stack import Stack

BUILT = pytest.mark.skipif(looks._extension is None, reason="the extension _cpu is not built")


@pytest.fixture(params=["python", pytest.param("c++", marks=BUILT)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(looks, "_extension", None)
    return request.param


def a_hook(dense: nn.Module) -> None:
    dense.register_forward_hook(lambda *_: None)


def a_pre_hook(dense: nn.Module) -> None:
    dense.register_forward_pre_hook(lambda *_: None)


def hooks_in_a_new_dictionary(dense: nn.Module) -> None:
    dense._forward_hooks = OrderedDict({0: lambda *_: None})


def training(dense: nn.Module) -> None:
    dense.train()


def own_forward(dense: nn.Module) -> None:
    dense.forward = types.MethodType(lambda self, x: x, dense)


def other_state(dense: nn.Module) -> None:
    dense.__dict__ = {**dense.__dict__, "training": True}


class Dense(nn.Linear):
    pass


def other_class(dense: nn.Module) -> None:
    dense.__class__ = Dense


def a_child(dense: nn.Module) -> None:
    dense.adapter = nn.Identity()


def objects(stack: Stack) -> bool:
    try:
        return not stack.is_unchanged()
    except NotFastError:
        return True


CHANGES: list[Callable[[nn.Module], None]] = [
    a_hook,
    a_pre_hook,
    hooks_in_a_new_dictionary,
    training,
    own_forward,
    other_state,
    other_class,
    a_child,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_module_show(change: Callable[[nn.Module], None], way: str) -> None:
    model = tiny()
    stack = Stack(model, ("embeddings", "encoder"))
    assert stack.is_unchanged()
    assert looks.are_quiet(stack._edges) == (way == "c++")
    change(model.encoder.layer[1].output.dense)
    assert not looks.are_quiet(stack._edges)
    assert objects(stack)


@pytest.mark.parametrize("part", ["encoder", "encoder.layer.1.output.dense"])
def test_a_replaced_module_shows(part: str, way: str) -> None:
    model = tiny()
    stack = Stack(model, ("embeddings", "encoder"))
    parent, _, name = part.rpartition(".")
    home = model.get_submodule(parent)
    home._modules[name] = tiny(seed=1).get_submodule(part)
    assert not stack.is_unchanged()


def test_hooks_of_transformers_are_harmless(way: str) -> None:
    model = tiny()
    stack = Stack(model, ("embeddings", "encoder"))

    def hook(*_: Any) -> None:
        pass

    hook.__module__ = "transformers.utils.output_capturing"
    model.encoder.layer[0].register_forward_hook(hook)
    assert stack.is_unchanged()


def data(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Parameter], None]:
    def set_data(weight: nn.Parameter) -> None:
        weight.data = change(weight.data)

    return set_data


def set_tensor(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.set_(weight.detach().clone())


def swap(weight: nn.Parameter) -> None:
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().clone()))


MOVES = {
    "elsewhere": data(lambda w: w.clone()),
    "transposed": data(lambda w: w.t()),
    "fewer rows": data(lambda w: w[:4]),
    "a row later": data(lambda w: w[1:]),
    "reshaped": data(lambda w: w.view(4, 16)),
    "every second column": data(lambda w: w[:, ::2]),
    "half precision": data(lambda w: w.half()),
    "other bits": data(lambda w: w.view(torch.int32)),
    "set_": set_tensor,
    "swap_tensors": swap,
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_moves_of_a_tensor_show(move: Callable[[nn.Parameter], None], way: str) -> None:
    weight, other = nn.Parameter(torch.randn(8, 8), requires_grad=False), torch.randn(3)
    before = looks.places_of([other, None, weight])
    assert looks.places_of([other, None, weight]) == before
    assert isinstance(before, bytes) == (way == "c++" and looks._exchange is not None)
    with torch.inference_mode():
        assert looks.places_of([other, None, weight]) == before
    move(weight)
    assert looks.places_of([other, None, weight]) != before


def test_no_tensor_where_one_was_shows(way: str) -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    assert looks.places_of([weight, None]) != looks.places_of([None, weight])
    assert looks.places_of([weight, None]) != looks.places_of([weight, weight])


def test_versions(way: str) -> None:
    weight, other = nn.Parameter(torch.randn(8, 8)), torch.randn(3)
    before = looks.versions_of([weight, None, other])
    assert looks.versions_of([weight, None, other]) == before
    assert not looks.is_in_doubt(before)
    with torch.no_grad():
        weight.mul_(2)
    assert looks.versions_of([weight, None, other]) != before
    with torch.inference_mode():
        uncounted = torch.randn(3)
    assert looks.is_in_doubt(looks.versions_of([weight, uncounted]))
    assert not looks.is_in_doubt(looks.versions_of([]))
