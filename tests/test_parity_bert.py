"""The same numbers: every BERT head, dtype and mask against float64, by the parity rule."""

import pytest
import torch
import zoo
from berts import (
    DEVICE,
    DTYPES,
    HEADS,
    RXNFP,
    base_width,
    inputs,
    minilm,
    minilm_path,
    rxnfp,
    tiny,
)
from kernel_backends import model_backends

import encoder_fast
from encoder_fast.parity import compare

MASKS = ("none", "right", "holes", "empty_row", "left", "mixed")


# Their few numbers a text are enough of them in many texts alone (see test_families).
TEXT_HEADS = ("PreTraining", "NextSentencePrediction", "SequenceClassification", "MultipleChoice")


def call_for(head: str, kind: str) -> dict:
    calls = [inputs(kind) for _ in range(16 if head.endswith(TEXT_HEADS) else 1)]
    call = {name: torch.cat([one[name] for one in calls]) for name in calls[0]}
    if head == "BertForMultipleChoice":
        # questions of two choices
        return {name: value.view(-1, 2, value.shape[1]) for name, value in call.items()}
    return call


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backend", model_backends())
def test_heads(backend: str, head: str, dtype: str, kind: str) -> None:
    model = tiny(head, **zoo.sizes_for(backend, "bert", DTYPES[dtype])).to(DTYPES[dtype])
    report = encoder_fast.check_parity(model, call_for(head, kind), backend=backend)
    assert report.ok, str(report)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", model_backends())
def test_base_size(backend: str, dtype: str) -> None:
    zoo.sizes_for(backend, "bert", DTYPES[dtype])  # its own will do, where the dtype does
    model = base_width().to(DTYPES[dtype])
    call = inputs("right", length=65, vocab=1000)
    report = encoder_fast.check_parity(model, call, backend=backend)
    assert report.ok, str(report)


class Scaled(torch.nn.GELU):
    """A user's activation that is a GELU by inheritance only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.5


@pytest.mark.parametrize(
    "activation",
    [
        pytest.param(Scaled(), id="subclass"),
        pytest.param(type("ReLU", (torch.nn.Tanh,), {})(), id="a-name-that-lies"),
        # across the inner features: it must see all of them at once
        pytest.param(torch.nn.Softmax(dim=-1), id="softmax"),
    ],
)
def test_activations_of_the_users_own(activation: torch.nn.Module) -> None:
    model = tiny(intermediate_size=1600)
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = activation.eval()
    report = encoder_fast.check_parity(model, inputs())
    assert report.ok, str(report)


def test_scaling_of_the_models_own() -> None:
    model = encoder_fast.patch(tiny())
    attention = model.encoder.layer[0].attention.self
    if not hasattr(attention, "scaling"):
        pytest.skip("transformers 4 computes the scale in the forward")
    attention.scaling = 0.01
    report = encoder_fast.check_parity(model, inputs())
    assert report.ok, str(report)


def test_nan_weights_come_out_as_nan() -> None:
    for act in ("gelu", "relu"):
        model = encoder_fast.patch(tiny(hidden_act=act))
        with torch.inference_mode():
            model(**inputs())
            model.encoder.layer[0].intermediate.dense.weight[3, 3] = float("nan")
            assert model(**inputs())[0][0].isnan().all()


def test_lengths_around_tile_edges() -> None:
    model = tiny(max_position_embeddings=600)
    for length in (1, 15, 16, 17, 63, 64, 65, 127, 129):
        report = encoder_fast.check_parity(model, inputs("right", length=max(length, 14)))
        assert report.ok, f"length {length}\n{report}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", model_backends())
def test_minilm(backend: str, dtype: str) -> None:
    from transformers import AutoTokenizer

    zoo.sizes_for(backend, "bert", DTYPES[dtype])
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    texts = [
        "The invoice was paid twice and the customer wants one payment back.",
        "Hello",
        "A padding-free encoder computes only what is asked for. " * 12,
        "",
    ]
    call = tokenizer(texts, padding=True, return_tensors="pt").to(DEVICE)
    report = encoder_fast.check_parity(minilm(DTYPES[dtype]), call, backend=backend)
    assert report.ok, str(report)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RXNFP)
def test_rxnfp(name: str, dtype: str) -> None:
    model, vocab = rxnfp(name)
    call = inputs("right", length=30, vocab=len(vocab))
    call["token_type_ids"].zero_()
    report = encoder_fast.check_parity(model.to(DTYPES[dtype]), call)
    assert report.ok, str(report)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu", "gelu_fast", "quick_gelu"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations(act: str, dtype: str) -> None:
    model = tiny(hidden_act=act).to(DTYPES[dtype])
    report = encoder_fast.check_parity(model, inputs())
    assert report.ok, str(report)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"layer_norm_eps": 1e-3}, id="eps"),
        pytest.param({"type_vocab_size": 1}, id="one-token-type"),
        pytest.param({"hidden_size": 10, "num_attention_heads": 2}, id="heads-of-5"),
        pytest.param({"intermediate_size": 1601}, id="inner-width-in-slices"),
        pytest.param({"chunk_size_feed_forward": 7}, id="chunked-feed-forward"),
    ],
)
def test_configurations(changes: dict) -> None:
    if DEVICE == "cuda" and changes.get("hidden_size") == 10:
        pytest.skip("the GPU kernels run heads of 16 to 128: test_patching covers the refusal")
    model = tiny(**changes)
    call = inputs("right", length=21)
    if "type_vocab_size" in changes:
        call["token_type_ids"].zero_()
    report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)


def test_a_wrong_epsilon_breaks_the_rule() -> None:
    """The rule is sharp enough to see LayerNorm's epsilon at 1e-5 in place of 1e-12."""
    model = minilm()
    call = inputs("right", length=21, vocab=1000)
    call["token_type_ids"].zero_()
    with torch.inference_mode():
        exact = minilm().double()(**call).last_hidden_state
        original = model(**call).last_hidden_state
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5
        wrong = encoder_fast.patch(model)(**call).last_hidden_state
    valid = call["attention_mask"].bool()
    assert not compare("eps", wrong, original, exact, valid).ok


def test_a_tanh_gelu_breaks_the_rule() -> None:
    model = minilm()
    call = inputs("right", length=21, vocab=1000)
    call["token_type_ids"].zero_()
    with torch.inference_mode():
        exact = minilm().double()(**call).last_hidden_state
        original = model(**call).last_hidden_state
        for layer in model.encoder.layer:
            layer.intermediate.intermediate_act_fn = torch.nn.GELU(approximate="tanh").eval()
        wrong = encoder_fast.patch(model)(**call).last_hidden_state
    valid = call["attention_mask"].bool()
    assert not compare("gelu", wrong, original, exact, valid).ok


def test_padding_comes_back_as_zeros() -> None:
    model = encoder_fast.patch(tiny())
    call = inputs("holes")
    with torch.inference_mode():
        output = model(**call, output_hidden_states=True)
    padded = ~call["attention_mask"].bool()
    for state in (output.last_hidden_state, *output.hidden_states):
        assert state[padded].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_row_gives_no_nan(dtype: str) -> None:
    model = encoder_fast.patch(tiny().to(DTYPES[dtype]))
    call = inputs("empty_row")
    with torch.inference_mode():
        output = model(**call)
        call["attention_mask"].zero_()
        nothing = model(**call)
    for tensor in (*output.to_tuple(), *nothing.to_tuple()):
        assert tensor.isfinite().all()
    assert encoder_fast.report(model).fallbacks == {}


def test_sequences_do_not_see_each_other() -> None:
    model = encoder_fast.patch(tiny())
    call = inputs("right")
    with torch.inference_mode():
        before = model(**call).last_hidden_state
        call["input_ids"][1:] = (call["input_ids"][1:] + 1) % 97
        after = model(**call).last_hidden_state
    assert torch.equal(before[0], after[0])


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
@pytest.mark.parametrize(
    "head",
    [
        "BertModel",
        "BertForPreTraining",
        "BertForMaskedLM",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
    ],
)
def test_no_rows(head: str, masked: bool) -> None:
    """The outputs of one row, without the row. The original has an error of its own instead."""
    model = tiny(head)

    def call(rows: int) -> dict:
        ids = torch.ones(rows, 5, dtype=torch.long, device=DEVICE)
        given = {"input_ids": ids, "output_hidden_states": True}
        return {**given, "attention_mask": ids} if masked else given

    with torch.inference_mode():
        theirs = model(**call(1))
        ours = encoder_fast.patch(model, strict=True)(**call(0))
    assert list(ours.keys()) == list(theirs.keys())
    for name, expected in theirs.items():
        states = isinstance(expected, tuple)
        both = zip(ours[name], expected, strict=True) if states else [(ours[name], expected)]
        for output, original in both:
            assert output.shape == (0, *original.shape[1:]), name
            assert output.dtype == original.dtype
    assert encoder_fast.report(model).fast_calls == 1
