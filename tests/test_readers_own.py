"""A user's own code that reads padding gets zeros, and the report names it."""

from collections.abc import Callable

import pytest
import torch
import zoo
from berts import DEVICE, inputs, tiny
from torch import Tensor, nn

import encoder_fast
from encoder_fast.patching import readers

st = pytest.importorskip("sentence_transformers", minversion="6")
from reader_models import TEXTS, Mean, Own, embed, folder, reasons, sequence, token_dense  # noqa: E402
from sentence_transformers.base.modules import (  # noqa: E402
    Dense,
)
from sentence_transformers.sentence_transformer.modules import (  # noqa: E402
    Pooling,
)

__all__ = ["folder"]  # fixture


def test_a_head_of_the_users_own_gets_zeros_and_the_report_says_so() -> None:
    model, call = Mean(encoder_fast.patch(tiny())), inputs("right")
    with torch.inference_mode():
        for _ in range(2):
            model(**call)
        assert "padding was returned as zeros to whoever called it" in str(
            encoder_fast.report(model)
        )
        encoder_fast.patch(model)
        model(**inputs("none"))
        assert encoder_fast.report(model).encoders[0].zeros_to == ()
        for _ in range(2):
            model(**call)
    assert not model.seen[-1][call["attention_mask"] == 0].any()
    report = encoder_fast.report(model)
    assert (report.fast_calls, report.fallbacks) == (3, {})
    assert report.encoders[0].zeros_to == ("Mean",)
    assert str(report).count("padding was returned as zeros to Mean") == 1


@pytest.mark.parametrize("mixed", [False, True])
def test_padding_is_of_one_kind_in_a_batch(mixed: bool) -> None:
    """Zeros in every row, or, where a first column that is padding may be read, the original's."""
    model, call = encoder_fast.patch(Mean(tiny())), inputs("mixed" if mixed else "right")
    padding = call["attention_mask"] == 0
    with torch.inference_mode():
        model(**call)
    assert bool(model.seen[0][padding].any(dim=1).all()) == mixed
    assert bool(model.seen[0][padding].any()) == mixed
    assert bool(encoder_fast.report(model).fallbacks) == mixed


def test_a_module_of_the_users_own_in_a_sequence(folder: str) -> None:
    model = encoder_fast.patch(sequence(folder, Own(), Pooling(48)), strict=True)
    model.encode(TEXTS)
    assert encoder_fast.report(model).encoders[0].zeros_to == ("Own",)


def test_a_part_of_a_head_that_is_the_users_own() -> None:
    class Tagger(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.cumsum(dim=1))

    model = zoo.build("bert", "ForTokenClassification")
    model.classifier = Tagger(48, 3).to(DEVICE)
    encoder_fast.patch(model, strict=True)
    with torch.inference_mode():
        model(**inputs("right"))
    assert encoder_fast.report(model).encoders[0].zeros_to == ("Tagger",)


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForSequenceClassification"])
def test_heads_that_are_known_say_nothing(head: str) -> None:
    model = encoder_fast.patch(zoo.build("bert", head), strict=True)
    with torch.inference_mode():
        model(**inputs("right"))
    assert "zeros" not in str(encoder_fast.report(model))


class AllColumns(Pooling):
    """Replaces what the library's forward calls."""

    def _forward_padded(self, tokens: Tensor, *_: object, **__: object) -> list[Tensor]:
        return [tokens.mean(dim=1)]


def pooling_of_ones_own(where: str, monkeypatch: pytest.MonkeyPatch) -> Pooling:
    if where == "class":
        monkeypatch.setattr(Pooling, "_forward_padded", AllColumns._forward_padded)
    if where == "instance":
        pooling = Pooling(48)
        pooling._forward_padded = AllColumns(48)._forward_padded
        return pooling
    if where == "subclass of that name":
        return type("Pooling", (AllColumns,), {})(48)
    return AllColumns(48) if where == "subclass" else Pooling(48)


@pytest.mark.parametrize("where", ["class", "instance", "subclass", "subclass of that name"])
def test_a_method_of_a_pooling_replaced(
    where: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs, is given zeros, and is named; where a first column is padding, the original's."""
    model = encoder_fast.patch(sequence(folder, Pooling(48)))
    model.encode(TEXTS)
    assert encoder_fast.report(model).encoders[0].pooled_calls == 1
    model[1] = pooling_of_ones_own(where, monkeypatch)
    found = model.encode(TEXTS, convert_to_tensor=True)
    features = {n: x.to(DEVICE) for n, x in model.preprocess(TEXTS).items() if torch.is_tensor(x)}
    with torch.inference_mode():
        states = model[0].auto_model(**features).last_hidden_state
    torch.testing.assert_close(found, states.mean(dim=1), rtol=1e-4, atol=1e-5)
    named = encoder_fast.report(model).encoders[0].zeros_to
    assert any("Pooling" in name or name == "AllColumns" for name in named)


def activations() -> dict[str, Callable]:
    class Cumulative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(dim=1)

    def cumulative(x: Tensor) -> Tensor:
        return x.cumsum(dim=1)

    return {"Cumulative": Cumulative(), "cumulative": cumulative}


@pytest.mark.parametrize("name", activations())
def test_an_activation_of_the_users_own(name: str, folder: str) -> None:
    dense = Dense(
        48, 8, activation_function=activations()[name], module_input_name="token_embeddings"
    )
    model = encoder_fast.patch(sequence(folder, dense, Pooling(8)), strict=True)
    model.encode(TEXTS)
    assert encoder_fast.report(model).encoders[0].zeros_to == (name,)
    after = Dense(48, 8, activation_function=lambda x: x * 2)  # of texts, not of tokens
    model = encoder_fast.patch(sequence(folder, Pooling(48), after), strict=True)
    model.encode(TEXTS)
    assert encoder_fast.report(model).encoders[0].zeros_to == ()


def test_a_module_of_torch_over_columns(folder: str) -> None:
    softmax = nn.Softmax(dim=1)
    dense = Dense(48, 8, activation_function=softmax, module_input_name="token_embeddings")
    model = sequence(folder, dense, Pooling(8))
    before = model.encode(TEXTS)
    assert (encoder_fast.patch(model).encode(TEXTS) == before).all()
    assert "Softmax, which is not known to ignore padding" in reasons(model)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("where", ["0", "1", "1.linear", "2", ""])
def test_a_hook_among_modules(where: str, given: bool, folder: str) -> None:
    model = encoder_fast.patch(sequence(folder, token_dense(), Pooling(16)))
    model.encode(TEXTS)
    assert encoder_fast.report(model).encoders[0].zeros_to == ()
    module = model.get_submodule(where)
    if given:
        handle = module.register_forward_pre_hook(lambda *_: None)
    else:
        handle = module.register_forward_hook(lambda *_: None)
    model.encode(TEXTS)
    # Ahead of the encoder there is nothing to see.
    expected = () if given and where in ("", "0") else (f"a hook on {type(module).__name__}",)
    assert encoder_fast.report(model).encoders[0].zeros_to == expected
    handle.remove()
    encoder_fast.patch(model)
    model.encode(TEXTS)
    assert encoder_fast.report(model).encoders[0].zeros_to == ()


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForSequenceClassification"])
def test_a_hook_on_the_encoder_below_a_head(head: str) -> None:
    model = encoder_fast.patch(zoo.build("bert", head))
    model.bert.register_forward_hook(lambda *_: None)
    with torch.inference_mode():
        model(**inputs("right"))
        model(**inputs("mixed"))
    report = encoder_fast.report(model).encoders[0]
    assert (report.fast_calls, report.zeros_to) == (1, ("a hook on BertModel",))
    assert "left padding), which a hook on BertModel may read" in next(iter(report.fallbacks))


def test_forwards_on_instances(folder: str) -> None:
    model = encoder_fast.patch(zoo.build("bert", "ForTokenClassification"))
    model.forward = lambda **call: model.bert(**call)[0].mean(dim=1)
    with torch.inference_mode():
        model(**inputs("right"))
    name = f"the forward set on {type(model).__name__}"
    assert encoder_fast.report(model).encoders[0].zeros_to == (name,)
    model = encoder_fast.patch(sequence(folder, Pooling(48)))
    forward = model[0].forward
    model[0].forward = lambda features, **options: forward(features, **options)
    model.encode(TEXTS)
    assert encoder_fast.report(model).encoders[0].zeros_to == ("the forward set on Transformer",)


def test_whoever_called_what_holds_the_encoder(folder: str) -> None:
    model = encoder_fast.patch(zoo.build("bert", "ForTokenClassification"))
    with torch.inference_mode():
        model.bert(**inputs("right"))
    assert encoder_fast.report(model).encoders[0].zeros_to == (readers.CALLER,)
    model = encoder_fast.patch(sequence(folder, Pooling(48)))
    embed(model, folder)
    assert encoder_fast.report(model).encoders[0].zeros_to == (readers.CALLER,)
