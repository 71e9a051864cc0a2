"""What an original forward reads of its modules in each call counts for a patched model too.

Attribute access is traced in a call of the original. Then each attribute found is given another
value, in the original and in a patched model that has run before.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from zoo import FAMILIES, PAD, VOCAB, build

import encoder_fast
from encoder_fast.families import find_family
from encoder_fast.patching.locate import STATE

_COMMON = set(nn.Module().__dict__)


@contextlib.contextmanager
def traced() -> Iterator[set[tuple[int, str]]]:
    """The plain attributes that are read: ids of the modules, and names."""
    found: set[tuple[int, str]] = set()

    def read(self: nn.Module, name: str) -> Any:
        if name not in _COMMON and name in object.__getattribute__(self, "__dict__"):
            found.add((id(self), name))
        return object.__getattribute__(self, name)

    nn.Module.__getattribute__ = read  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del nn.Module.__getattribute__


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(PAD + 1, VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outcome(model: nn.Module) -> Any:
    """The states of the tokens, or that there was an error."""
    with torch.inference_mode():
        try:
            states = model(**inputs()).last_hidden_state
        except Exception:
            return "an error"
    return states[inputs()["attention_mask"] == 1]


def others(value: Any) -> list[Any]:
    """Other values that an attribute might be given."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value // 2 if value else 1]
    if isinstance(value, float):
        return [value * 1.5 + 0.01]
    if isinstance(value, (list, tuple)):
        return [value[1:]]
    if value is nn.functional.gelu:
        return [torch.tanh]
    return []


# Numbers that no forward in eval mode depends on.
_WITHOUT_EFFECT = {"p", "inplace", "padding_idx of Embedding", "norm_type", "scale_grad_by_freq"}
_WITHOUT_EFFECT |= {"sparse", "max_norm"}


def attributes(family: str) -> list[tuple[str, str]]:
    """The paths of modules and the attributes that their original forwards read of them."""
    model = build(family)
    with torch.inference_mode(), traced() as found:
        model(**inputs())
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for path, module in model.named_modules():
        if path.split(".")[0] not in find_family(type(model)).stack:
            continue
        kind = type(module).__name__
        for name in module.__dict__:
            if (id(module), name) in found and not {name, f"{name} of {kind}"} & _WITHOUT_EFFECT:
                # One module of a class is enough, and the last: it differs from the others then.
                seen[kind, name] = (path, name)
    return list(seen.values())


def same(actual: Any, expected: Any) -> bool:
    if isinstance(expected, str) or isinstance(actual, str):
        return actual is expected
    return torch.allclose(actual, expected, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attribute_that_the_original_reads(family: str) -> None:
    found = attributes(family)
    assert len(found) > 3
    for path, name in found:
        for value in others(getattr(build(family).get_submodule(path), name)):
            original, patched = build(family), encoder_fast.patch(build(family))
            outcome(patched)
            for model in (original, patched):
                setattr(model.get_submodule(path), name, value)
            expected, actual = outcome(original), outcome(patched)
            # The original may raise where its result would have been right.
            harmless = name in ("chunk_size_feed_forward", "seq_len_dim")
            assert harmless or same(actual, expected), (path, name, value)


@pytest.mark.parametrize("family", ["deberta", "deberta_v2"])
def test_a_list_that_is_written_into(family: str) -> None:
    types = (["c2p", "p2c"], ["c2p", "p2c"])
    original, patched = (build(family, pos_att_type=own) for own in types)
    outcome(encoder_fast.patch(patched))
    for model in (original, patched):
        model.config.pos_att_type.remove("p2c")  # the layers' own, too
    assert same(outcome(patched), outcome(original))
    assert not encoder_fast.report(patched).fallbacks


def test_scaled_rotations_run_fast() -> None:
    original = build("modernbert")
    for module in original.modules():
        for name in list(module.__dict__):
            if name.endswith("attention_scaling"):
                setattr(module, name, 1.3)
    patched = encoder_fast.patch(copy.deepcopy(original), strict=True)
    assert same(outcome(patched), outcome(original))


def test_a_layer_with_another_config() -> None:
    patched = encoder_fast.patch(build("bert"))
    outcome(patched)
    attention = patched.encoder.layer[0].attention.self
    if "config" not in attention.__dict__:
        pytest.skip("layers of this transformers look at no config")
    attention.config = copy.deepcopy(patched.config)
    outcome(patched)
    assert not encoder_fast.report(patched).fallbacks
    attention.config._attn_implementation_internal = "somebody's"
    outcome(patched)
    assert list(encoder_fast.report(patched).fallbacks) == ['attn_implementation="somebody\'s"']


CHANGES: dict[str, Callable[[Any], None]] = {
    "roberta": lambda m: setattr(m.embeddings, "padding_idx", 3),
    "albert": lambda m: setattr(m.config, "num_hidden_groups", 1),
}


@pytest.mark.parametrize("family", CHANGES)
def test_the_changed_models_numbers(family: str) -> None:
    original, patched = build(family), encoder_fast.patch(build(family))
    before = outcome(patched)
    for model in (original, patched):
        CHANGES[family](model)
    assert same(outcome(patched), outcome(original))
    assert not same(outcome(patched), before)


def test_a_model_that_is_written_to_in_passing_stays_prepared() -> None:
    patched = encoder_fast.patch(build("bert"))
    outcome(patched)
    reading = patched.__dict__[STATE]._reading
    for module in patched.modules():
        module.somebodys_note = 1
    outcome(patched)
    assert patched.__dict__[STATE]._reading is reading
    assert encoder_fast.report(patched).fast_calls == 2
