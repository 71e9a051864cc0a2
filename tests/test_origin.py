"""Whose code a function is: seen through the decorators of libraries, which users use too."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from berts import config, inputs, tiny
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import generic

import encoder_fast
from encoder_fast.families.origin import is_library_code, is_users_code

BERT = sys.modules[transformers.BertModel.__module__]
LIBRARYS: Any = BERT.BertSelfOutput.forward


def users(self: Any, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
    return LIBRARYS(self, hidden, *args) * 2


@contextlib.contextmanager
def context() -> Iterator[None]:
    yield


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x * 2


def deprecating(function: Callable) -> Callable:
    return transformers.utils.deprecation.deprecate_kwarg("old", version="99.0")(function)


def checking(function: Callable) -> Callable:
    check: Any = getattr(generic, "check_model_inputs")  # noqa: B009
    return check()(function) if "tie" in str(check.__code__.co_varnames) else check(function)


# None of these changes what a function computes.
TRANSPARENT: dict[str, Callable] = {
    "can_return_tuple": generic.can_return_tuple,
    "check_model_inputs": checking,
    "deprecate_kwarg": deprecating,
    "no_grad": torch.no_grad(),
    "inference_mode": torch.inference_mode(),
    "compiler.disable": torch.compiler.disable,
    "sdpa_kernel": torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "lru_cache": functools.lru_cache,
    "partial": functools.partial,
    "two": lambda function: torch.no_grad()(generic.can_return_tuple(function)),
}


@pytest.mark.parametrize("decorate", TRANSPARENT.values(), ids=TRANSPARENT.keys())
def test_a_librarys_decorator_is_seen_through(decorate: Callable) -> None:
    assert is_library_code(decorate(LIBRARYS))
    assert not is_users_code(decorate(LIBRARYS))
    assert not is_library_code(decorate(users))
    assert is_users_code(decorate(users))


def unnamed(function: Callable) -> Callable:
    """As a decorator of a library that does not use functools.wraps."""
    decorated = generic.can_return_tuple(function)
    del decorated.__wrapped__  # type: ignore[attr-defined]
    return decorated


@pytest.mark.parametrize(
    "value",
    [
        unnamed(users),
        unnamed(functools.partial(users)),
        unnamed(unnamed(users)),
        functools.partial(functools.update_wrapper, users),
        functools.partial(LIBRARYS, hidden=users),
        functools.wraps(LIBRARYS)(lambda *_: None),
        context()(LIBRARYS),
        Doubling.apply,
        staticmethod(users),
    ],
)
def test_what_holds_a_users_function_is_a_users(value: Any) -> None:
    assert is_users_code(value)
    assert not is_library_code(value)


def test_a_closure_of_the_librarys_own() -> None:
    assert is_library_code(unnamed(LIBRARYS), ("transformers.",))
    assert not is_users_code(unnamed(LIBRARYS))


def test_what_changes_the_numbers_is_nobodys_own() -> None:
    assert not is_library_code(torch.autocast("cpu")(LIBRARYS))


def test_a_function_that_holds_itself() -> None:
    decorated = unnamed(LIBRARYS)
    assert decorated.__closure__ is not None
    decorated.__closure__[0].cell_contents = decorated
    assert not is_users_code(decorated)


@pytest.mark.parametrize("decorate", [generic.can_return_tuple, deprecating, unnamed])
def test_a_decorated_head_of_the_users_own(decorate: Callable) -> None:
    """It reads every token, where the library's own reads the first."""

    class Mine(transformers.BertForSequenceClassification):
        @decorate
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **_: Any) -> Any:
            hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1)
            return SequenceClassifierOutput(
                logits=self.classifier((hidden * mask).sum(1) / mask.sum(1))
            )

    torch.manual_seed(0)
    model = Mine(config(initializer_range=0.5)).eval()
    call = inputs("right")
    with torch.inference_mode():
        expected = model(**call).logits
        encoder_fast.patch(model, strict=True)
        torch.testing.assert_close(model(**call).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("when", ["before patch", "after patch"])
@pytest.mark.parametrize("name", ["BertModel", "BertLayer", "BertSelfOutput"])
def test_a_decorated_forward_on_a_class_of_the_library(
    name: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls: Any = getattr(BERT, name)
    forward = cls.forward

    @generic.can_return_tuple
    def mine(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if isinstance(output, torch.Tensor):
            return output * 2
        if isinstance(output, tuple):
            return (output[0] * 2, *output[1:])
        output.last_hidden_state *= 2
        return output

    model, call = tiny(), inputs("right")
    if when == "after patch":
        encoder_fast.patch(model)
    monkeypatch.setattr(cls, "forward", mine)
    if when == "before patch":
        with pytest.raises(encoder_fast.UnsupportedModelError, match=r"replaced|holds no encoder"):
            encoder_fast.patch(model)
        return
    with torch.inference_mode():
        output = model(**call).last_hidden_state
        assert encoder_fast.report(model).fast_calls == 0
        assert torch.equal(output, encoder_fast.unpatch(model)(**call).last_hidden_state)


def test_a_decorated_forward_of_a_class_on_top_sees_every_token() -> None:
    model = encoder_fast.patch(transformers.BertForSequenceClassification(config()).eval())
    call, seen = inputs("right"), []
    cls: Any = type(model.bert)

    class Traced(cls):
        @generic.can_return_tuple
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            seen.append(output[0].shape[:2])
            return output

    model.bert.__class__ = Traced
    with torch.inference_mode():
        model(**call)
    assert seen == [call["input_ids"].shape]
    assert encoder_fast.report(model).fast_calls == 1
