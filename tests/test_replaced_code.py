"""Library code that is replaced under its name, without a module or a forward being touched.

Each test replaces something with what gives other numbers, looks whether the patched model gives
those of the original, and puts it back.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.activations import ACT2FN
from zoo import FAMILIES, PAD, VOCAB, build

import encoder_fast
from encoder_fast.families.code import Code

IDS = torch.randint(PAD + 1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
FIVE = int(transformers.__version__.split(".")[0]) >= 5


def states(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state


def home_of(family: str) -> Any:
    return sys.modules[type(build(family)).__module__]


def twice(function: Callable) -> Callable:
    """A function of the user's own that looks like the library's."""

    @functools.wraps(function)
    def doubled(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if isinstance(result, tuple):
            return (result[0] * 2, *result[1:])
        return None if result is None else result * 2

    return doubled


class Doubled:
    """As an object instead of a function."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return twice(self.function)(*args, **kwargs)


def follows(
    family: str,
    replace: Callable[[pytest.MonkeyPatch], object],
    reason: str,
    **changes: object,
) -> None:
    """Check a patched model while something is replaced: from a call on, and from before
    patching."""
    original, patched, late = (build(family, **changes) for _ in range(3))
    encoder_fast.patch(patched)
    plain = states(patched)
    assert not encoder_fast.report(patched).fallbacks
    with pytest.MonkeyPatch.context() as monkeypatch:
        replace(monkeypatch)
        expected = states(original)
        assert not torch.allclose(expected, plain, atol=1e-3)
        for model in (patched, encoder_fast.patch(late)):
            torch.testing.assert_close(states(model), expected)
            (found,) = encoder_fast.report(model).fallbacks
            assert reason in found
    torch.testing.assert_close(states(patched), plain)
    assert encoder_fast.report(patched).fast_calls == 2


def set_global(family: str, name: str, wrap: Callable = twice) -> Callable:
    home = home_of(family)
    return lambda monkeypatch: monkeypatch.setattr(home, name, wrap(getattr(home, name)))


@pytest.mark.skipif(not FIVE, reason="transformers 5's names")
@pytest.mark.parametrize("family", [f for f in FAMILIES if "deberta" not in f and f != "mpnet"])
def test_eager_attention(family: str) -> None:
    replace = set_global(family, "eager_attention_forward")
    follows(family, replace, "eager_attention_forward", attn_implementation="eager")


@pytest.mark.skipif(not FIVE, reason="transformers 5's names")
@pytest.mark.parametrize("wrap", [Doubled, lambda function: functools.partial(Doubled(function))])
def test_what_is_no_function(wrap: Callable) -> None:
    replace = set_global("bert", "eager_attention_forward", wrap)
    follows("bert", replace, "eager_attention_forward", attn_implementation="eager")


@pytest.mark.skipif(not FIVE, reason="transformers 5's tables")
@pytest.mark.parametrize("where", ["_global_mapping", "_local_mapping"])
@pytest.mark.parametrize("table", ["ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS"])
def test_an_entry_of_a_table(table: str, where: str) -> None:
    home = home_of("bert") if table == "ALL_ATTENTION_FUNCTIONS" else transformers.masking_utils
    mapping = getattr(getattr(home, table), where)
    function = getattr(home, table)["sdpa"]

    def none_of_the_first(*args: Any, **kwargs: Any) -> torch.Tensor:
        mask = torch.ones(2, 1, 12, 12, dtype=torch.bool)
        mask[..., :3] = False
        return mask

    other = twice(function) if table == "ALL_ATTENTION_FUNCTIONS" else none_of_the_first
    follows("bert", lambda m: m.setitem(mapping, "sdpa", other), f"{table}['sdpa'] was replaced")


@pytest.mark.skipif(not FIVE, reason="transformers 5's tables")
def test_an_entry_that_this_model_does_not_use() -> None:
    model = encoder_fast.patch(build("bert"), strict=True)
    expected = states(model)
    table = home_of("bert").ALL_ATTENTION_FUNCTIONS
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(table._global_mapping, "flash_attention_2", twice(table["sdpa"]))
        assert torch.equal(states(model), expected)


@pytest.mark.skipif(not FIVE, reason="transformers 5's tables")
def test_another_table() -> None:
    home = home_of("bert")
    table = type(home.ALL_ATTENTION_FUNCTIONS)()
    table["sdpa"] = twice(table["sdpa"])
    follows(
        "bert",
        lambda m: m.setattr(home, "ALL_ATTENTION_FUNCTIONS", table),
        "was replaced",
    )


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert", "apply_chunking_to_forward"),
        ("albert", "apply_chunking_to_forward"),
        ("distilbert", "apply_chunking_to_forward"),
        ("modernbert", "rotate_half"),
        ("deberta", "build_rpos"),
        ("deberta_v2", "make_log_bucket_position"),
    ],
)
def test_a_function_of_the_models_module(family: str, name: str) -> None:
    follows(family, set_global(family, name), f"{name} was replaced")


@pytest.mark.skipif(not FIVE, reason="transformers 5's names")
@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet"])
def test_mask_functions(family: str) -> None:
    home = home_of(family)

    def masked(*args: Any, **kwargs: Any) -> torch.Tensor:
        mask = torch.ones(2, 1, 12, 12, dtype=torch.bool)
        mask[..., :3] = False
        return torch.where(mask, 0.0, -1e30)

    follows(
        family,
        lambda m: m.setattr(home, "create_bidirectional_mask", masked),
        "create_bidirectional_mask was replaced",
    )


@pytest.mark.skipif(not FIVE, reason="transformers 5 calls it under this name")
def test_pytorchs_attention() -> None:
    other = twice(F.scaled_dot_product_attention)
    replace = lambda m: m.setattr(F, "scaled_dot_product_attention", other)  # noqa: E731
    follows("bert", replace, "scaled_dot_product_attention was replaced")


def test_a_method() -> None:
    layer: Any = type(build("bert").encoder.layer[0])
    other = twice(layer.feed_forward_chunk)
    replace = lambda m: m.setattr(layer, "feed_forward_chunk", other)  # noqa: E731
    follows("bert", replace, "feed_forward_chunk was replaced")


def test_a_method_of_one_layer() -> None:
    original, patched = build("bert"), encoder_fast.patch(build("bert"))
    plain = states(patched)
    for model in (original, patched):
        layer: Any = model.encoder.layer[0]
        layer.feed_forward_chunk = twice(layer.feed_forward_chunk)
    torch.testing.assert_close(states(patched), states(original))
    (reason,) = encoder_fast.report(patched).fallbacks
    assert reason == "feed_forward_chunk of a BertLayer was replaced"
    del patched.encoder.layer[0].feed_forward_chunk
    torch.testing.assert_close(states(patched), plain)


def test_the_activation_of_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"conv_kernel_size": 3, "conv_act": "gelu"}
    original, patched = (build("deberta_v2", **changes) for _ in range(2))
    before = states(encoder_fast.patch(patched))
    monkeypatch.setitem(ACT2FN, "gelu", nn.SiLU)
    expected = states(original)
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(states(patched), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_library_is_its_own(family: str) -> None:
    model = build(family)
    code = Code(model, list(model.modules()))
    code.check("sdpa")
    code.check("eager")
    assert 2 < len(code.dictionaries) < 20


@pytest.mark.skipif(not FIVE, reason="transformers 5's names")
@pytest.mark.parametrize(
    ("family", "place", "name", "other"),
    [
        ("bert", "masking", "bidirectional_mask_function", "causal_mask_function"),
        (
            "modernbert",
            "model",
            "create_bidirectional_sliding_window_mask",
            "create_bidirectional_mask",
        ),
        ("modernbert", "model", "rotate_half", torch.neg),
        ("bert", F, "softmax", F.log_softmax),
        ("bert", F, "linear", torch.ops.aten.linear.default),
        ("bert", F, "relu", F.selu),
        ("bert", torch, "matmul", torch.bmm),
        ("bert", torch, "tanh", torch.sin),
        ("bert", nn.LayerNorm, "forward", nn.Identity.forward),
        ("bert", nn.Linear, "forward", nn.Identity.forward),
    ],
)
def test_the_librarys_own_under_another_name(
    family: str, place: Any, name: str, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers are not compared: some of these give none."""
    patched = encoder_fast.patch(build(family))
    states(patched)
    if isinstance(place, str):
        place = sys.modules["transformers.masking_utils"] if place == "masking" else home_of(family)
    other = getattr(place, other) if isinstance(other, str) else other
    monkeypatch.setattr(place, name, other)
    before = encoder_fast.report(patched).fast_calls
    with contextlib.suppress(Exception):
        states(patched)
    assert encoder_fast.report(patched).fast_calls == before
    monkeypatch.undo()
    states(patched)
    assert encoder_fast.report(patched).fast_calls == before + 1
