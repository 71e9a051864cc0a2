"""Nothing silent: what can't run fast runs the original, and is counted with its reason."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
import zoo
from berts import DEVICE, inputs, tiny
from torch import nn
from torch.nn.utils import parametrize

import encoder_fast
from encoder_fast.errors import NotFastError
from encoder_fast.patching.arguments import read_arguments

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


def hook(model: nn.Module) -> None:
    model.encoder.layer[1].attention.register_forward_hook(lambda *_: None)


def pre_hook(model: nn.Module) -> None:
    model.embeddings.register_forward_pre_hook(lambda *_: None)


def adapter(model: nn.Module) -> None:
    class LowRank(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + 1

    attention = model.encoder.layer[0].attention.self
    attention.query = LowRank(attention.query).eval()


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def parametrisation(model: nn.Module) -> None:
    dense = model.encoder.layer[0].output.dense
    parametrize.register_parametrization(dense, "weight", Doubled())
    model.eval()


def dropout_in_training(model: nn.Module) -> None:
    model.encoder.layer[0].attention.self.dropout.train()


def replaced_forward(model: nn.Module) -> None:
    dense = model.encoder.layer[0].output.dense
    original = dense.forward
    dense.forward = lambda x: original(x) * 2


def foreign_weight(model: nn.Module) -> None:
    class Quantised(nn.Parameter):
        pass

    dense = model.encoder.layer[0].output.dense
    dense.weight = Quantised(dense.weight.detach())


def causal_module(model: nn.Module) -> None:
    model.encoder.layer[0].attention.self.is_causal = True


def causal_config(model: nn.Module) -> None:
    model.config.is_causal = True


def own_attention(model: nn.Module) -> None:
    # never called: sdpa classes of transformers 4 don't look at it
    model.config._attn_implementation = "somebody's own"


def own_positions(model: nn.Module) -> None:
    model.embeddings.position_ids.add_(3)


def own_token_types(model: nn.Module) -> None:
    model.embeddings.token_type_ids.fill_(1)


def own_pooler(model: nn.Module) -> None:
    class Mean(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.mean(dim=1)

    model.pooler = Mean().eval()


def weight_as_attribute(model: nn.Module) -> None:
    dense = model.encoder.layer[0].output.dense
    weight = dense.weight.detach()
    del dense.weight
    dense.weight = weight


def replica(model: nn.Module) -> None:
    model._is_replica = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (causal_module, "a causal attention module"),
        pytest.param(
            causal_config, "is_causal", marks=pytest.mark.skipif(not TRANSFORMERS_5, reason="5.x")
        ),
        (own_positions, "position_ids does not count from 0"),
        (own_token_types, "token_type_ids is not all zeros"),
        (own_pooler, "Mean stands where BertPooler is expected"),
        (weight_as_attribute, "a Linear whose weight is no parameter"),
        (replica, "a replica of nn.DataParallel"),
        (hook, "a hook on BertAttention"),
        (pre_hook, "a hook on BertEmbeddings"),
        (adapter, "LowRank stands where Linear is expected"),
        (parametrisation, "ParametrizedLinear stands where"),
        (dropout_in_training, "training mode (dropout is in it"),
        (replaced_forward, "the forward of a Linear inside the stack was replaced"),
        (foreign_weight, "a weight is a Quantised"),
    ],
)
def test_changes_to_the_model(change: Callable[[nn.Module], None], reason: str) -> None:
    model, call = encoder_fast.patch(tiny()), inputs()
    with torch.inference_mode(False), torch.no_grad():
        model(**call)
        change(model)
        torch.manual_seed(0)
        output = model(**call)[0]
        counted = encoder_fast.report(model)
        torch.manual_seed(0)
        expected = encoder_fast.unpatch(model)(**call)[0]
    assert counted.fast_calls == 1
    assert sum(counted.fallbacks.values()) == 1
    assert reason in next(iter(counted.fallbacks))
    assert torch.equal(output, expected)


def mask_for_each_query(call: dict) -> dict:
    """As prefix or block attention needs; transformers 4 takes three dimensions, 5 takes four."""
    mask = call["attention_mask"].bool()
    pairs = mask[:, None, :] | mask.flip(1)[:, :, None]
    return {**call, "attention_mask": pairs[:, None] if TRANSFORMERS_5 else pairs.long()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda call: {**call, "output_attentions": True}, "output_attentions"),
        (
            lambda call: {**call, "encoder_hidden_states": torch.zeros(4, 3, 48, device=DEVICE)},
            "argument encoder_hidden_states",
        ),
        (lambda call: {**call, "is_causal": False}, "argument is_causal"),
        (mask_for_each_query, "attention_mask of "),
        (
            lambda call: {**call, "attention_mask": call["attention_mask"] * 0.5},
            "values other than 0 and 1",
        ),
        (
            lambda call: {**call, "position_ids": torch.arange(21, device=DEVICE)},
            "position_ids of 1 dimensions",
        ),
    ],
)
def test_arguments(change: Callable[[dict], dict], reason: str) -> None:
    model = tiny(attn_implementation="eager")
    call = change(inputs())
    if "is_causal" in call and not TRANSFORMERS_5:
        pytest.skip("transformers 4 knows no is_causal")
    with torch.inference_mode():
        expected = model(**call)
        output = encoder_fast.patch(model)(**call)
    report = encoder_fast.report(model)
    assert report.fast_calls == 0
    assert reason in next(iter(report.fallbacks))
    for ours, theirs in zip(output.to_tuple(), expected.to_tuple(), strict=True):
        if isinstance(theirs, torch.Tensor):
            assert torch.equal(ours, theirs)
    with pytest.raises(encoder_fast.FallbackError, match="strict=True"), torch.inference_mode():
        encoder_fast.patch(model, strict=True)(**call)


def empty_cache() -> transformers.Cache:
    return transformers.DynamicCache()


# transformers 5 takes those that it no longer knows among the forward's **kwargs
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("past_key_values", empty_cache),
        ("cache_position", lambda: torch.arange(21, device=DEVICE)),
        ("encoder_attention_mask", lambda: torch.ones(4, 3, device=DEVICE)),
        ("head_mask", lambda: torch.tensor([[1.0, 0.0, 1.0]] * 2, device=DEVICE)),
    ],
)
def test_arguments_of_decoders_and_pruning(name: str, value: Callable[[], object]) -> None:
    model, call = tiny(attn_implementation="eager"), inputs()
    with torch.inference_mode():
        # anew for each call: a cache keeps what it was given
        expected = model(**call, **{name: value()})[0]
        output = encoder_fast.patch(model)(**call, **{name: value()})[0]
    report = encoder_fast.report(model)
    assert report.fast_calls == 0
    assert report.fallbacks == {f"argument {name}": 1}
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 5, 48), torch.float64), ((2, 5, 48), torch.float16), ((2, 5, 47), torch.float32)],
    ids=["wider-dtype", "narrower-dtype", "width"],
)
def test_embeddings_that_do_not_fit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What the original makes of them, which may be an error of its own."""
    model, embeds = tiny(), torch.randn(shape, device=DEVICE).to(dtype)

    def outcome() -> torch.Tensor | str:
        try:
            return model(inputs_embeds=embeds)[0]
        except RuntimeError as error:
            return str(error)

    with torch.inference_mode():
        expected = outcome()
        encoder_fast.patch(model)
        output = outcome()
    report = encoder_fast.report(model)
    assert report.fast_calls == 0
    (reason,) = report.fallbacks
    assert reason.startswith(f"inputs_embeds of 3 dimensions and {dtype}")
    if isinstance(expected, str):
        assert output == expected
    else:
        assert torch.equal(output, expected)


@pytest.mark.parametrize(
    "register", ["register_module_forward_hook", "register_module_forward_pre_hook"]
)
def test_hooks_on_all_modules(register: str) -> None:
    model, call, seen = encoder_fast.patch(tiny()), inputs(), []
    handle = getattr(nn.modules.module, register)(lambda module, *_: seen.append(type(module)))
    try:
        with torch.inference_mode():
            model(**call)
    finally:
        handle.remove()
    assert encoder_fast.report(model).fallbacks == {"global module hooks are registered": 1}
    assert type(model.encoder.layer[1].output.dense) in seen
    with torch.inference_mode():
        model(**call)
    assert encoder_fast.report(model).fast_calls == 1


@pytest.mark.filterwarnings("ignore")
def test_jit_tracing() -> None:
    """A trace holds the original's operations: it gives right numbers for other masks too."""
    model, other = tiny(attn_implementation="eager", return_dict=False), inputs("left")
    with torch.inference_mode():
        expected = model(other["input_ids"], other["attention_mask"])[0]
    call = inputs()
    encoder_fast.patch(model)
    with torch.no_grad():
        traced = torch.jit.trace(
            model, (call["input_ids"], call["attention_mask"]), check_trace=False
        )
        assert encoder_fast.report(model).fallbacks == {"torch.jit tracing": 1}
        output = traced(other["input_ids"], other["attention_mask"])[0]
    assert encoder_fast.report(model).fast_calls == 0
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    """An exported program is the original's too, and the patched model stays as it was."""
    model, call = encoder_fast.patch(tiny(attn_implementation="eager")), inputs()
    with torch.no_grad():
        program = torch.export.export(model, (), call, strict=strict)
    report = encoder_fast.report(model)
    assert (report.fast_calls, report.fallbacks) == (0, {})
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names and not any("encoder_fast" in name for name in names)
    with torch.inference_mode():
        model(**call)
        expected = encoder_fast.unpatch(model)(**call)[0]
        output = program.module()(**call)[0]
    torch.testing.assert_close(output, expected)


def test_an_attention_function_of_the_users_own() -> None:
    model, call = encoder_fast.patch(tiny()), inputs()
    own_attention(model)
    with pytest.raises(encoder_fast.FallbackError, match="somebody's own"), torch.inference_mode():
        encoder_fast.patch(model, strict=True)(**call)


def test_a_class_whose_forward_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """After patching, before it, on the model's class and on a layer's: always the replacement."""
    import functools

    def doubled(cls: type) -> None:
        original = cls.forward

        @functools.wraps(original)
        def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
            output = original(self, *args, **kwargs)
            return output * 2 if isinstance(output, torch.Tensor) else output

        monkeypatch.setattr(cls, "forward", forward)

    model, call = encoder_fast.patch(tiny()), inputs()
    with torch.inference_mode():
        before = model(**call)[0]
        doubled(type(model.encoder.layer[0].output))
        after = model(**call)[0]
        assert not torch.equal(before, after)
        assert torch.equal(after, encoder_fast.unpatch(copy.deepcopy(model))(**call)[0])
        with pytest.raises(encoder_fast.UnsupportedModelError, match="BertOutput was replaced"):
            encoder_fast.patch(tiny())
        doubled(transformers.BertModel)
        model(**call)
    assert "the forward of BertModel was replaced" in encoder_fast.report(model).fallbacks
    with pytest.raises(encoder_fast.UnsupportedModelError):
        encoder_fast.patch(tiny())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_forward_mode_autograd() -> None:
    # SDPA has no forward-mode formula
    model = tiny(attn_implementation="eager").requires_grad_(False)
    x, t = torch.randn(2, 2, 5, 48, device=DEVICE)

    def run(embeds: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=embeds)[0]

    _, expected = torch.func.jvp(run, (x,), (t,))
    encoder_fast.patch(model)
    _, tangent = torch.func.jvp(run, (x,), (t,))
    assert torch.equal(tangent, expected)
    report = encoder_fast.report(model)
    assert report.fast_calls == 0
    assert report.fallbacks == {"torch.func or forward-mode autograd": 1}


def test_a_tensor_that_is_not_plain() -> None:
    class Wrapped(torch.Tensor):
        pass

    model, call = encoder_fast.patch(tiny()), inputs()
    with torch.inference_mode():
        model(call["input_ids"].as_subclass(Wrapped), call["attention_mask"])
    assert encoder_fast.report(model).fallbacks == {"input_ids is a Wrapped, not a plain tensor": 1}


def test_reasons_are_few() -> None:
    model = encoder_fast.patch(tiny())
    with torch.inference_mode():
        for length in range(14, 20):
            call = mask_for_each_query(inputs(length=length))
            model(**call)
    assert len(encoder_fast.report(model).fallbacks) == 1


def test_attentions_are_those_of_the_original_and_leave_no_trace() -> None:
    model, call = encoder_fast.patch(tiny(attn_implementation="eager")), inputs()
    with torch.inference_mode():
        output = model(**call, output_attentions=True)
        assert output.attentions[0].shape == (4, 3, 21, 21)
        # transformers 5 leaves capturing hooks behind; they must not end the fast path
        model(**call)
    assert encoder_fast.report(model).fast_calls == 1


def test_training_and_gradients() -> None:
    model, call = encoder_fast.patch(tiny()), inputs()
    loss = model(**call)[0].sum()
    loss.backward()
    assert model.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    model.train()
    with torch.no_grad():
        model(**call)
    reasons = list(encoder_fast.report(model).fallbacks)
    assert "gradients are enabled" in reasons[0]
    assert "training mode" in reasons[1]


def test_frozen_parameters_need_no_no_grad() -> None:
    model = encoder_fast.patch(tiny().requires_grad_(False))
    model(**inputs())
    assert encoder_fast.report(model).fast_calls == 1


def test_gradient_to_the_embeddings_is_given() -> None:
    model = encoder_fast.patch(tiny().requires_grad_(False))
    embeds = torch.randn(2, 5, 48, device=DEVICE, requires_grad=True)
    model(inputs_embeds=embeds)[0].sum().backward()
    assert embeds.grad is not None
    report = encoder_fast.report(model)
    assert report.fast_calls == 0
    (reason,) = report.fallbacks
    assert "gradients are enabled" in reason


def test_decoders() -> None:
    model = tiny("BertLMHeadModel", is_decoder=True)
    call = inputs()
    with torch.inference_mode():
        expected = model(**call).logits
        output = encoder_fast.patch(model)(**call).logits
    assert torch.equal(output, expected)
    assert encoder_fast.report(model).fallbacks == {"is_decoder": 1}


def test_autocast() -> None:
    model, call = encoder_fast.patch(tiny()), inputs()
    with torch.inference_mode(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        model(**call)
    assert "autocast" in next(iter(encoder_fast.report(model).fallbacks))


def test_float64() -> None:
    model, call = encoder_fast.patch(tiny().double()), inputs()
    with torch.inference_mode():
        assert model(**call)[0].dtype == torch.float64
    assert "dtype torch.float64" in next(iter(encoder_fast.report(model).fallbacks))


def test_invalid_calls_raise_the_models_own_error() -> None:
    model = encoder_fast.patch(tiny())
    with torch.inference_mode(), pytest.raises(ValueError, match="input_ids"):
        model()


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("name", ["token_type_ids", "position_ids", "use_cache", "return_dict"])
def test_an_argument_counts_as_the_original_takes_it(family: str, name: str) -> None:
    ids = torch.arange(5, 14, device=DEVICE)[None]
    value = {"token_type_ids": torch.zeros_like(ids), "position_ids": ids - 3}.get(name, False)

    def outcome(model: nn.Module) -> str:
        with torch.inference_mode():
            try:
                model(input_ids=ids, **{name: value})
            except TypeError as error:
                return str(error)
        return "taken"

    changes = {} if "deberta" not in family else {"type_vocab_size": 2}
    model = zoo.build(family, **changes)
    expected = outcome(model)
    assert outcome(encoder_fast.patch(model)) == expected
    assert ("does not take" in str(encoder_fast.report(model))) == (expected != "taken")


def test_a_forward_that_names_its_arguments() -> None:
    class Few:
        def forward(self, input_ids=None, attention_mask=None, *, return_dict=None):
            pass

    ids = torch.ones(1, 3, dtype=torch.long)
    read_arguments(Few, transformers.BertConfig(), (ids,), {"return_dict": True})
    for name in ("token_type_ids", "use_cache", "output_hidden_states"):
        with pytest.raises(NotFastError, match=f"does not take, {name}"):
            read_arguments(Few, transformers.BertConfig(), (ids,), {name: None})


def test_too_long_names_the_limit() -> None:
    model = encoder_fast.patch(tiny())
    ids = torch.zeros(1, 41, dtype=torch.long, device=DEVICE)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"length 41 .* limit of 40"):
        model(ids)


def test_ids_out_of_range() -> None:
    model, call = encoder_fast.patch(tiny()), inputs()
    call["input_ids"][0, 3] = 97
    with torch.inference_mode(), pytest.raises(IndexError):
        model(**call)


def test_a_strict_fallback_names_its_reason() -> None:
    model = encoder_fast.patch(tiny(), strict=True)
    with pytest.raises(encoder_fast.FallbackError, match="gradients are enabled"):
        model(**inputs())
    assert sum(encoder_fast.report(model).fallbacks.values()) == 1


def test_layers_taken_away_are_noticed() -> None:
    """Dropping layers is no reason to fall back: the model is read anew."""
    model, call = encoder_fast.patch(tiny(num_hidden_layers=3)), inputs()
    with torch.inference_mode():
        model(**call)
        del model.encoder.layer[2]
        output = model(**call)[0]
        assert encoder_fast.report(model).fast_calls == 2
        model.encoder.layer.append(tiny(seed=5).encoder.layer[0])
        longer = model(**call)[0]
    assert encoder_fast.report(model).fast_calls == 3
    assert not torch.equal(output, longer)
    report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)
