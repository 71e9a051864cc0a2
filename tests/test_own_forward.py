"""A forward on an instance: it sees what the original gives, and the module's own does no harm."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from berts import DEVICE, inputs, minilm_path, tiny
from test_families import call_for
from torch import nn
from transformers import AutoTokenizer

import encoder_fast

pytest.importorskip("accelerate")
pytest.importorskip("sentence_transformers")
from accelerate.hooks import (
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from accelerate.utils import (
    convert_outputs_to_fp32,
    extract_model_from_parallel,
)
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tiny"))
    tiny(vocab_size=30522).save_pretrained(path)
    AutoTokenizer.from_pretrained(minilm_path()).save_pretrained(path)
    return path


Shapes = list[tuple[int, ...]]


def _note(output: object, seen: Shapes) -> object:
    seen.append(tuple(output[0].shape))  # type: ignore[index]
    return output


def by_hand(module: nn.Module, seen: Shapes) -> None:
    inner = module.forward
    module.forward = lambda *args, **kwargs: _note(inner(*args, **kwargs), seen)


def with_wraps(module: nn.Module, seen: Shapes) -> None:
    inner = module.forward

    @functools.wraps(inner)
    def wrapped(*args: object, **kwargs: object) -> object:
        return _note(inner(*args, **kwargs), seen)

    module.forward = wrapped


def as_a_method(module: nn.Module, seen: Shapes) -> None:
    inner = module.forward

    def method(_: nn.Module, *args: object, **kwargs: object) -> object:
        return _note(inner(*args, **kwargs), seen)

    module.forward = types.MethodType(method, module)


def with_partial(module: nn.Module, seen: Shapes) -> None:
    inner = module.forward

    def traced(log: Shapes, *args: object, **kwargs: object) -> object:
        return _note(inner(*args, **kwargs), log)

    module.forward = functools.update_wrapper(functools.partial(traced, seen), inner)


def with_accelerate(module: nn.Module, seen: Shapes) -> None:
    class Look(ModelHook):
        def post_forward(self, module: nn.Module, output: object) -> object:
            return _note(output, seen)

    add_hook_to_module(module, Look())


def class_on_top(module: nn.Module, seen: Shapes) -> None:
    class Traced(type(module)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            return _note(super().forward(*args, **kwargs), seen)

    module.__class__ = Traced


def call_on_top(module: nn.Module, seen: Shapes) -> None:
    class Traced(type(module)):  # type: ignore[misc]
        def __call__(self, *args: object, **kwargs: object) -> object:
            return _note(super().__call__(*args, **kwargs), seen)

    module.__class__ = Traced


def call_impl(module: nn.Module, seen: Shapes) -> None:
    inner = module._call_impl
    module._call_impl = lambda *args, **kwargs: _note(inner(*args, **kwargs), seen)


def call_impl_on_top(module: nn.Module, seen: Shapes) -> None:
    class Traced(type(module)):  # type: ignore[misc]
        def _call_impl(self, *args: object, **kwargs: object) -> object:
            return _note(super()._call_impl(*args, **kwargs), seen)

    module.__class__ = Traced


def compiled_call(module: nn.Module, seen: Shapes) -> None:
    inner = module._call_impl
    module._compiled_call_impl = lambda *args, **kwargs: _note(inner(*args, **kwargs), seen)


CALLS = [call_on_top, call_impl, call_impl_on_top, compiled_call]
WAYS = [by_hand, with_wraps, as_a_method, with_partial, with_accelerate, class_on_top]


@pytest.mark.parametrize("way", [*WAYS, *CALLS])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_above_an_encoder_under_a_head(family: str, way: Callable, rows: list[int]) -> None:
    """A head that reads the first token has its encoder compute nothing else, where none looks."""
    head = "ForSequenceClassification"
    model, call = encoder_fast.patch(zoo.build(family, head)), call_for(family, head, "right")
    shape = (*call["input_ids"].shape, 48)
    with torch.inference_mode():
        expected = model(**call).logits
        assert rows[-1] == shape[0]
        seen: Shapes = []
        way(model.base_model, seen)
        logits = model(**call).logits
    assert seen == [shape]
    assert encoder_fast.report(model).fast_calls == 2
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["bert.pooler.dense", "classifier"])
@pytest.mark.parametrize("way", [by_hand, with_accelerate, class_on_top, *CALLS])
def test_above_what_a_head_reads_with(way: Callable, where: str, rows: list[int]) -> None:
    model = encoder_fast.patch(zoo.build("bert", "ForSequenceClassification"))
    way(model.get_submodule(where), [])
    with torch.inference_mode():
        model(**inputs("right"))
    assert rows[-1] == rows[0] > 4


@pytest.mark.parametrize("way", [with_wraps, *CALLS])
@pytest.mark.parametrize("where", ["encoder.layer.0", "encoder.layer.1.output.dense"])
def test_inside_the_stack(where: str, way: Callable) -> None:
    model, call, seen = encoder_fast.patch(tiny()), inputs("right"), []
    with torch.inference_mode():
        model(**call)
        way(model.get_submodule(where), seen)
        model(**call)
    assert len(seen) == 1
    (reason,) = encoder_fast.report(model).fallbacks
    assert "replaced" in reason or "Traced" in reason


def test_what_every_module_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees all modules, as a global hook does."""
    model = encoder_fast.patch(zoo.build("bert", "ForSequenceClassification"))
    call, seen, inner = inputs("right"), [], nn.Module.__call__

    def traced(module: nn.Module, *args: object, **kwargs: object) -> object:
        output = inner(module, *args, **kwargs)
        seen.append((type(module).__name__, output[0].shape))
        return output

    with torch.inference_mode():
        model(**call)
        monkeypatch.setattr(nn.Module, "__call__", traced)
        model(**call)
    assert ("BertModel", (*call["input_ids"].shape, 48)) in seen
    assert "BertLayer" in dict(seen)
    assert "runs was replaced" in next(iter(encoder_fast.report(model).fallbacks))


def test_a_pooler_sees_what_it_would_get() -> None:
    model, call, seen = encoder_fast.patch(tiny()), inputs("right"), []

    def watching(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden[:, 1])
        return inner(hidden)

    with torch.inference_mode():
        expected = model(**call)
        inner = model.pooler._call_impl
        model.pooler._call_impl = watching
        model(**call)
    assert torch.equal(seen[0], expected.last_hidden_state[:, 1])


def _sentence_transformer(folder: str) -> Any:
    modules = [Transformer(folder), Pooling(48, "cls")]
    return SentenceTransformer(modules=modules, device=DEVICE)


TEXTS = ["Hello world", "A longer text about encoders."]


@pytest.mark.parametrize("way", WAYS)
def test_above_an_encoder_in_a_sentence_transformer(way: Callable, folder: str) -> None:
    model = encoder_fast.patch(_sentence_transformer(folder))
    expected = model.encode(TEXTS, convert_to_tensor=True)
    width = model.tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"].shape[1]
    seen: Shapes = []
    way(model[0].auto_model, seen)
    after = model.encode(TEXTS, convert_to_tensor=True)
    assert seen == [(len(TEXTS), width, 48)]
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("index", [0, 1])
def test_above_the_modules_of_one(index: int, when: str, folder: str) -> None:
    """What a module behind the encoder is given, or the transformer hands on."""
    model, seen = _sentence_transformer(folder), []

    def wrap() -> None:
        inner = model[index].forward

        def wrapped(features: dict, **options: object) -> dict:
            features = inner(features, **options)
            seen.append(tuple(features["token_embeddings"].shape[:2]))
            return features

        model[index].forward = wrapped

    if when == "before":
        wrap()
    encoder_fast.patch(model)
    if when == "after":
        wrap()
    model.encode(TEXTS)
    width = model.tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"].shape[1]
    assert seen == [(len(TEXTS), width)]


@pytest.mark.parametrize("way", [by_hand, with_accelerate, call_impl])
def test_above_an_encoder_of_packed_texts(way: Callable, folder: str) -> None:
    """Packed tokens go around the model's call, and so around the wrapper."""
    encoder = encoder_fast.TextEncoder.from_pretrained(folder)
    expected, seen = encoder.encode(TEXTS), []
    way(encoder.model, seen)
    torch.testing.assert_close(
        torch.as_tensor(encoder.encode(TEXTS)), torch.as_tensor(expected), rtol=1e-4, atol=1e-4
    )
    assert len(seen) == 1 and seen[0][2] == 48


def removed(module: nn.Module) -> None:
    add_hook_to_module(module, ModelHook())
    remove_hook_from_module(module)


def unwrapped(module: nn.Module) -> None:
    """As accelerate does after mixed precision."""
    module._original_forward = module.forward
    module.forward = types.MethodType(convert_outputs_to_fp32(module.forward.__func__), module)
    extract_model_from_parallel(module, keep_fp32_wrapper=False)


def partial_of_nothing(module: nn.Module) -> None:
    module.forward = functools.partial(functools.partial(module.forward))


def its_wrapped(module: nn.Module) -> None:
    with_partial(module, [])
    module.forward = module.forward.__wrapped__


HARMLESS = [removed, unwrapped, partial_of_nothing, its_wrapped]
PLACES = ["", "bert", "bert.encoder.layer.0.output.dense", "bert.pooler.dense"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("leave", HARMLESS)
def test_a_modules_own_method_left_behind(
    leave: Callable, where: str, when: str, rows: list[int]
) -> None:
    model = zoo.build("bert", "ForSequenceClassification")
    module, call = model.get_submodule(where), inputs("right")
    with torch.inference_mode():
        expected = model(**call).logits
        if when == "before":
            leave(module)
        encoder_fast.patch(model, strict=True)
        if when == "after":
            leave(module)
        assert "forward" in module.__dict__ or where in ("", "bert")
        logits = model(**call).logits
        assert rows[-1] == 4 < rows[0]
        assert torch.equal(copy.deepcopy(model)(**call).logits, logits)
        assert torch.equal(encoder_fast.unpatch(model)(**call).logits, expected)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("when", ["before", "after"])
def test_left_behind_in_a_sentence_transformer(when: str, index: int, folder: str) -> None:
    model = _sentence_transformer(folder)
    if when == "before":
        removed(model[index])
    encoder_fast.patch(model)
    if when == "after":
        removed(model[index])
    model.encode(TEXTS)
    assert encoder_fast.report(model).encoders[0].pooled_calls == 1


def test_the_method_of_another_module_is_no_module_s_own() -> None:
    """As a copy by hand of a module's attributes leaves it."""
    model, other, call = encoder_fast.patch(tiny()), tiny(), inputs("right")
    dense = model.encoder.layer[0].output.dense
    dense.forward = other.encoder.layer[1].output.dense.forward
    with torch.inference_mode():
        output = model(**call)[0]
        assert "the forward of a Linear" in next(iter(encoder_fast.report(model).fallbacks))
        assert torch.equal(output, encoder_fast.unpatch(model)(**call)[0])


def test_the_method_from_before_patching_is_put_back() -> None:
    model, call = tiny(), inputs("right")
    before = model.forward
    encoder_fast.patch(model)
    by_hand(model, [])
    model.forward = before
    with torch.inference_mode():
        model(**call)
    report = encoder_fast.report(model)
    assert (report.fast_calls, report.fallbacks) == (1, {})


@pytest.mark.parametrize("leave", ["hook", "method"])
def test_the_patched_method_is_left_behind(leave: str) -> None:
    """On a model that is not patched any more, and then is again."""
    model, call = tiny(), inputs("right")
    with torch.inference_mode():
        expected = model(**call)[0]
        with encoder_fast.patched(model):
            before = model.forward
            if leave == "hook":
                add_hook_to_module(model, ModelHook())
        if leave == "hook":
            remove_hook_from_module(model)
        else:
            model.forward = before
        assert torch.equal(model(**call)[0], expected)
        encoder_fast.patch(model, strict=True)
        model(**call)
        assert encoder_fast.report(model).fast_calls == 1
        assert torch.equal(encoder_fast.unpatch(model)(**call)[0], expected)


def test_a_function_that_copies_the_patched_method_s_attributes_is_a_users() -> None:
    model, call, seen = encoder_fast.patch(tiny()), inputs("right"), []
    as_a_method(model, seen)
    functools.update_wrapper(model.forward.__func__, type(model).forward)
    encoder_fast.unpatch(model)
    with pytest.raises(encoder_fast.UnsupportedModelError, match="on the instance"):
        encoder_fast.patch(model)
    with torch.inference_mode():
        model(**call)
    assert len(seen) == 1


@pytest.mark.parametrize("where", ["", "classifier"])
def test_a_hook_on_a_head_is_removed_after_patching(where: str, rows: list[int]) -> None:
    model, call = zoo.build("bert", "ForSequenceClassification"), inputs("right")
    module = model.get_submodule(where)
    add_hook_to_module(module, ModelHook())
    encoder_fast.patch(model)
    with torch.inference_mode():
        model(**call)
        assert rows[-1] == rows[0] > 4
        remove_hook_from_module(module)
        model(**call)
    assert rows[-1] == 4


@pytest.mark.parametrize("index", [None, 0, 1])
def test_a_hook_in_a_sentence_transformer_is_removed_after_patching(
    index: int | None, folder: str
) -> None:
    model = _sentence_transformer(folder)
    module = model if index is None else model[index]
    add_hook_to_module(module, ModelHook())
    encoder_fast.patch(model)
    model.encode(TEXTS)
    assert encoder_fast.report(model).encoders[0].pooled_calls == 0
    remove_hook_from_module(module)
    model.encode(TEXTS)
    assert encoder_fast.report(model).encoders[0].pooled_calls == 1
