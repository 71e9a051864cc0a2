"""What each call looks at in modules and weights: changes show, in C++ and in Python."""

from __future__ import annotations

import copy
import gc
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from berts import tiny
from torch import Tensor, nn

import encoder_fast
from encoder_fast import looks
from encoder_fast.errors import NotFastError
from encoder_fast.families import bert
from encoder_fast.patching.stack import Stack

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
NUMBERED = hasattr(looks._extension, "numbers_of")
needs_numbers = pytest.mark.skipif(not NUMBERED, reason="dictionaries have no numbers here")
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


def objects(stack: Stack, model: Any) -> bool:
    try:
        return not stack.is_unchanged(model)
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
    stack = Stack(model, bert.FAMILY)
    assert stack.is_unchanged(model)
    assert looks.are_quiet(stack._edges) == (way == "c++")
    change(model.encoder.layer[1].output.dense)
    assert not looks.are_quiet(stack._edges)
    assert objects(stack, model)


@pytest.mark.parametrize("part", ["encoder", "encoder.layer.1.output.dense"])
def test_a_replaced_module_shows(part: str, way: str) -> None:
    model = tiny()
    stack = Stack(model, bert.FAMILY)
    parent, _, name = part.rpartition(".")
    home = model.get_submodule(parent)
    home._modules[name] = tiny(seed=1).get_submodule(part)
    assert not stack.is_unchanged(model)


def test_hooks_of_transformers_are_harmless(way: str) -> None:
    model = tiny()
    stack = Stack(model, bert.FAMILY)
    with torch.no_grad():
        model(torch.ones(1, 2, dtype=torch.long), output_hidden_states=True)
    hooks = [hook for m in model.modules() for hook in m._forward_hooks.values()]
    assert bool(hooks) == TRANSFORMERS_5  # 4 captures without hooks
    assert stack.is_unchanged(model)


def a_new_parameter(model: Any) -> None:
    model.encoder.layer[0].output.dense.weight = nn.Parameter(torch.zeros(64, 128))


def a_buffer_elsewhere(model: Any) -> None:
    model.embeddings.position_ids = model.embeddings.position_ids.clone()


def an_epsilon(model: Any) -> None:
    model.embeddings.LayerNorm.eps = 1e-3


def a_deleted_attribute(model: Any) -> None:
    model.encoder.layer[0].attention.self.mine = 1
    del model.encoder.layer[0].attention.self.mine


def a_setting(model: Any) -> None:
    model.config.num_hidden_layers = 1


def an_attribute_of_the_model(model: Any) -> None:
    model.z_steps = 2


def another_child(model: Any) -> None:
    model.adapter = nn.Identity()


MORE_CHANGES = [
    a_new_parameter,
    a_buffer_elsewhere,
    an_epsilon,
    a_deleted_attribute,
    a_setting,
    an_attribute_of_the_model,
    another_child,
    *(
        (lambda model, change=change: change(model.encoder.layer[1].output.dense))
        for change in CHANGES
    ),
]


@pytest.mark.parametrize("change", MORE_CHANGES)
def test_a_watch_notices(change: Callable[[Any], None]) -> None:
    model = tiny()
    watch = Stack(model, bert.FAMILY).watch
    mark = watch.look(model)
    assert (watch.look(model) is mark) == NUMBERED
    change(model)
    assert watch.look(model) is not mark
    assert (watch.look(model) is watch.mark) == NUMBERED


@needs_numbers
def test_a_watch_follows_what_was_put_in_place() -> None:
    """A dictionary that took another's place is watched from then on."""
    model = tiny()
    watch, dense = Stack(model, bert.FAMILY).watch, model.encoder.layer[1].output.dense
    for change in (hooks_in_a_new_dictionary, a_hook, other_state, a_pre_hook, own_forward):
        mark = watch.look(model)
        assert watch.look(model) is mark
        change(dense)
        assert watch.look(model) is not mark


@needs_numbers
def test_a_watch_notices_what_belongs_to_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    watch = Stack(model, bert.FAMILY).watch
    mark = watch.look(model)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    hooked = watch.look(model)
    assert hooked is not mark
    hook.remove()
    freed = watch.look(model)
    assert freed is not hooked
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    replaced = watch.look(model)
    assert replaced is not freed
    # All classes of a model's modules have this one as a base.
    monkeypatch.setattr(nn.Module, "scale", 2, raising=False)
    assert watch.look(model) is not replaced


@pytest.mark.parametrize("edit", ["elsewhere", "in place", "another"])
def test_a_changed_buffer_shows(edit: str, way: str) -> None:
    model = tiny()
    stack, positions = Stack(model, bert.FAMILY), model.embeddings.position_ids
    assert stack.is_unchanged(model)
    if edit == "elsewhere":
        positions.data = positions + 1
    elif edit == "in place":
        positions.add_(1)
    else:
        model.embeddings.position_ids = positions + 1
    assert not stack.is_unchanged(model)


@pytest.mark.parametrize("name", ["config", "pooler"])
def test_what_took_the_place_of_another_is_watched(name: str) -> None:
    """An equal one too: what is written to it later has to show."""
    model = tiny()
    stack = Stack(model, bert.FAMILY)
    setattr(model, name, copy.deepcopy(getattr(model, name)))
    assert not stack.is_unchanged(model)


@needs_numbers
def test_a_call_changes_nothing_that_is_watched() -> None:
    """Or each call would read all modules."""
    model = encoder_fast.patch(tiny(), "cpu", strict=True)
    ids = torch.ones(2, 5, dtype=torch.long)
    with torch.inference_mode():
        model(ids)
        watch = model.__dict__["_encoder_fast"]._reading.stack.watch
        mark = watch.mark
        model(ids, torch.ones_like(ids), output_hidden_states=True)
    assert watch.mark is mark


def test_a_watch_keeps_no_model_alive() -> None:
    model = encoder_fast.patch(tiny(), "cpu", strict=True)
    with torch.inference_mode():
        model(torch.ones(2, 5, dtype=torch.long))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


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
    assert looks.have_places([other, None, weight], before)
    move(weight)
    assert looks.places_of([other, None, weight]) != before
    assert not looks.have_places([other, None, weight], before)


def test_no_tensor_where_one_was_shows(way: str) -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    assert looks.places_of([weight, None]) != looks.places_of([None, weight])
    assert looks.places_of([weight, None]) != looks.places_of([weight, weight])
    for shorter, longer in (([weight], [weight, None]), ([], [weight])):
        assert not looks.have_places(shorter, looks.places_of(longer))
        assert not looks.have_places(longer, looks.places_of(shorter))


def test_versions(way: str) -> None:
    weight, other = nn.Parameter(torch.randn(8, 8)), torch.randn(3)
    before = looks.versions_of([weight, None, other])
    assert looks.versions_of([weight, None, other]) == before
    assert looks.have_versions([weight, None, other], before)
    assert not looks.is_in_doubt(before)
    with torch.no_grad():
        weight.mul_(2)
    assert looks.versions_of([weight, None, other]) != before
    assert not looks.have_versions([weight, None, other], before)
    with torch.inference_mode():
        uncounted = torch.randn(3)
    assert looks.is_in_doubt(looks.versions_of([weight, uncounted]))
    assert not looks.is_in_doubt(looks.versions_of([]))
