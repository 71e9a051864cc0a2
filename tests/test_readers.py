"""Who reads padding decides: library modules that do get the original's, a user's own zeros."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import zoo
from berts import DEVICE, config, inputs, tiny
from test_families import call_for
from torch import nn

import encoder_fast
from encoder_fast.patching import readers

st = pytest.importorskip("sentence_transformers", minversion="6")
from reader_models import TEXTS, Mean, embed, folder, reasons, sequence, token_dense  # noqa: E402
from sentence_transformers.base.modules import (  # noqa: E402
    Dense,
    Normalize,
    Router,
    Transformer,
)
from sentence_transformers.cross_encoder.modules import LogitScore  # noqa: E402
from sentence_transformers.multi_vector_encoder.modules import (  # noqa: E402
    HierarchicalTokenPooling,
    MultiVectorMask,
)
from sentence_transformers.sentence_transformer.modules import (  # noqa: E402
    CNN,
    LSTM,
    LayerNorm,
    Pooling,
    WeightedLayerPooling,
)
from sentence_transformers.sparse_encoder.modules import SpladePooling  # noqa: E402

__all__ = ["folder"]  # fixture


class Lengths(nn.Module):
    """What sentence-transformers' LSTM asks for, and no transformer gives."""

    def forward(self, features: dict) -> dict:
        features["sentence_lengths"] = features["attention_mask"].sum(dim=1)
        return features


def same(a: Any, b: Any) -> bool:
    return all(
        bool((x.double() - y.double()).abs().max() < 1e-4) for x, y in zip(a, b, strict=True)
    )


READERS: dict[str, Callable[[str], Any]] = {
    "CNN": lambda folder: sequence(folder, CNN(48, 16, [3]), Pooling(16)),
    "CNN behind others": lambda folder: sequence(folder, token_dense(), CNN(16, 8), Pooling(24)),
    "LSTM": lambda folder: sequence(folder, Lengths(), LSTM(48, 16), Pooling(32)),
    "CNN in a route": lambda folder: sequence_of_routes(
        folder, [CNN(48, 16, [3]), Pooling(16)], []
    ),
    "CNN behind a router": lambda folder: sequence_of_routes(
        folder, [], [CNN(48, 16), Pooling(48)]
    ),
    "CNN in a plain sequence": lambda folder: Holder(
        nn.Sequential(Transformer(folder), CNN(48, 16, [3]), Pooling(16)).to(DEVICE).eval()
    ),
}


class Holder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict) -> dict:
        return self.model(features)


def sequence_of_routes(folder: str, query: list, behind: list) -> Any:
    routes = {"query": [Transformer(folder), *query], "document": [Transformer(folder)]}
    return st.SentenceTransformer(
        modules=[Router(routes, default_route="query"), *behind], device=DEVICE
    ).eval()


@pytest.mark.parametrize("name", READERS)
def test_what_reads_padding_gets_the_originals(name: str, folder: str) -> None:
    model = READERS[name](folder)
    before = embed(model, folder)
    encoder_fast.patch(model)
    assert torch.equal(embed(model, folder), before)
    assert f"padding under {name.split()[0]}, which reads padding" in reasons(model)
    embed(model, folder, TEXTS[:1])  # without padding nobody reads any
    assert encoder_fast.report(model).fast_calls == 1
    clone = copy.deepcopy(model)
    assert torch.equal(embed(clone, folder), before)
    assert "which reads padding" in reasons(clone)


def test_what_comes_behind_after_patch_is_seen(folder: str) -> None:
    model = encoder_fast.patch(sequence(folder, Pooling(48)))
    model.encode(TEXTS)
    assert encoder_fast.report(model).fast_calls == 1
    model[1] = CNN(48, 48, [3]).to(DEVICE)
    model.append(Pooling(48))
    before = model.encode(TEXTS)
    assert "padding under CNN" in reasons(model)
    assert (model.encode(TEXTS) == before).all()
    encoder_fast.patch(model[0].auto_model)  # by itself: it still sits where it did
    model.encode(TEXTS)
    assert "padding under CNN" in reasons(model)


def test_another_route_runs_fast(folder: str) -> None:
    """The same modules, but the reader is not behind this transformer."""
    model = encoder_fast.patch(sequence_of_routes(folder, [CNN(48, 48, [3])], [Pooling(48)]))
    model.encode(TEXTS, task="document")
    assert encoder_fast.report(model).fast_calls == 1
    model.encode(TEXTS, task="query")
    assert "padding under CNN" in reasons(model)


def test_the_last_column_of_a_language_model(folder: str) -> None:
    """LogitScore takes it for the last token, which it is with padding on the left."""
    modules = [
        Transformer(folder, transformer_task="fill-mask"),
        LogitScore(7, module_input_name="token_embeddings"),
    ]
    model = nn.Sequential(*modules).to(DEVICE).eval()
    features = model[0].preprocess(TEXTS)
    features = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in features.items()}
    with torch.inference_mode():
        before = model(dict(features))["scores"]
        assert torch.equal(encoder_fast.patch(model)(dict(features))["scores"], before)
    assert "padding under LogitScore" in reasons(model)


def weighted_layers(folder: str) -> Any:
    pooling = WeightedLayerPooling(48, num_hidden_layers=2, layer_start=1)
    return sequence(folder, pooling, Pooling(48), config_kwargs={"output_hidden_states": True})


def sparse(folder: str) -> Any:
    modules = [Transformer(folder, transformer_task="fill-mask"), SpladePooling()]
    return st.SparseEncoder(modules=modules, device=DEVICE)


def dense_tokens(folder: str) -> Any:
    return sequence(
        folder, token_dense(), Normalize("token_embeddings"), Pooling(16), LayerNorm(16)
    )


@pytest.mark.parametrize("build", [weighted_layers, sparse, dense_tokens])
def test_what_ignores_padding_runs_fast(build: Callable, folder: str) -> None:
    model = build(folder)
    before = model.encode(TEXTS, convert_to_tensor=True)
    encoder_fast.patch(model, strict=True)
    after = model.encode(TEXTS, convert_to_tensor=True)
    assert same(after.to_dense(), before.to_dense())
    assert "zeros" not in str(encoder_fast.report(model))


def test_cross_encoder_over_pooled_tokens_runs_fast(folder: str) -> None:
    scores = Dense(48, 1, module_output_name="scores")
    modules = [Transformer(folder), Pooling(48), scores]
    model = st.CrossEncoder(modules=modules, device=DEVICE)
    pairs = [("a cat", text) for text in TEXTS]
    before = model.predict(pairs, convert_to_tensor=True)
    after = encoder_fast.patch(model, strict=True).predict(pairs, convert_to_tensor=True)
    assert same(after, before)


def vectors(folder: str, *behind: nn.Module, **expansion: object) -> Any:
    options = {"strategy": "fixed", "length": 16, **expansion}
    modules = [
        Transformer(folder, query_expansion=options),
        token_dense(),
        Normalize("token_embeddings"),
        MultiVectorMask(),
        *behind,
    ]
    return st.MultiVectorEncoder(modules=modules, device=DEVICE)


@pytest.mark.parametrize("strategy", ["fixed", "min"])
def test_query_expansion_scores_padding(strategy: str, folder: str) -> None:
    """For queries alone: documents of the same model run fast."""
    model = vectors(folder, strategy=strategy)
    queries, documents = model.encode_query(TEXTS), model.encode_document(TEXTS)
    encoder_fast.patch(model)
    assert all((a == b).all() for a, b in zip(model.encode_query(TEXTS), queries, strict=True))
    assert encoder_fast.report(model).fast_calls == 0
    assert "query expansion, which scores padding" in reasons(model)
    found = model.encode_document(TEXTS)
    assert encoder_fast.report(model).fast_calls == 1
    assert same(map(torch.as_tensor, found), map(torch.as_tensor, documents))
    clone = copy.deepcopy(model)
    clone.encode_document(TEXTS)
    assert encoder_fast.report(clone).fast_calls == 1


def test_query_expansion_that_is_attended_to_runs_fast(folder: str) -> None:
    model = vectors(folder, HierarchicalTokenPooling(2), attend=True)
    before = model.encode_query(TEXTS), model.encode_document(TEXTS)
    encoder_fast.patch(model, strict=True)
    after = model.encode_query(TEXTS), model.encode_document(TEXTS)
    for some, others in zip(before, after, strict=True):
        assert same(map(torch.as_tensor, some), map(torch.as_tensor, others))


def test_query_expansion_set_after_patch(folder: str) -> None:
    model = encoder_fast.patch(sequence(folder, token_dense(), MultiVectorMask()))
    model[0].query_expansion = {"strategy": "fixed", "length": 16}
    model.encode(TEXTS, output_value=None, task="query")
    assert "query expansion" in reasons(model)


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta_v2"])
def test_the_loss_of_answers_is_over_all_columns(family: str) -> None:
    """Its softmax is over padding too; without a loss nothing is, and the call runs fast."""
    model, call = zoo.build(family, "ForQuestionAnswering"), call_for(family, "", "right")
    spans = torch.tensor([1, 2, 0, 1], device=DEVICE)
    labels = {"start_positions": spans, "end_positions": spans + 1}
    with torch.inference_mode():
        expected = model(**call, **labels).loss
        encoder_fast.patch(model)
        assert torch.equal(model(**call, **labels).loss, expected)
        assert f"the loss of {type(model).__name__}, which is over all" in reasons(model)
        model(**call)
        model(call["input_ids"], **labels)  # no mask, no padding
    assert encoder_fast.report(model).fast_calls == 2


def test_the_loss_of_answers_under_a_wrapper_set_before() -> None:
    """It goes around what is patched, and nobody says whether a loss is asked for."""
    model, call = tiny("BertForQuestionAnswering"), inputs("right")
    spans = torch.tensor([1, 2, 0, 1], device=DEVICE)
    inner = model.forward
    model.forward = lambda **given: inner(**given)
    with torch.inference_mode():
        expected = model(**call, start_positions=spans, end_positions=spans).loss
        encoder_fast.patch(model)
        loss = model(**call, start_positions=spans, end_positions=spans).loss
    assert torch.equal(loss, expected)
    assert "whose forward was replaced before patch()" in reasons(model)


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForMaskedLM", "ForPreTraining"])
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_labels_of_padded_positions(family: str, head: str) -> None:
    """As ``labels=input_ids`` gives them; with -100 there, as collators do, it runs fast."""
    model, call = zoo.build(family, head), call_for(family, head, "right")
    padding = call["attention_mask"] == 0
    labels = call["input_ids"] % 2
    others = {}
    if (family, head) == ("bert", "ForPreTraining"):
        others = {"next_sentence_label": torch.zeros(4, dtype=torch.long, device=DEVICE)}
    with torch.inference_mode():
        expected = model(**call, labels=labels, **others).loss
        encoder_fast.patch(model)
        loss = model(**call, labels=labels, **others).loss
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        is_masked = (family, head) == ("electra", "ForPreTraining")
        assert is_masked or f"the loss of {type(model).__name__}, with labels" in reasons(model)
        assert encoder_fast.report(model).fast_calls == is_masked
        model(**call, labels=labels.masked_fill(padding, -100), **others)
    assert encoder_fast.report(model).fast_calls == 1 + is_masked


def test_a_loss_under_torch_compile() -> None:
    """What a traced head says would not be heard, so with a loss it is not traced."""
    torch._dynamo.reset()
    model, call = encoder_fast.patch(tiny("BertForTokenClassification")), inputs("right")
    compiled = torch.compile(model, backend="eager")
    with torch.inference_mode():
        compiled(**call, labels=call["input_ids"] % 2)
        compiled(**call)
    assert "with labels other than -100" in reasons(model)
    assert encoder_fast.report(model).fast_calls == 1


def test_a_first_column_under_torch_compile() -> None:
    torch._dynamo.reset()
    model, call = zoo.build("roberta", "ForSequenceClassification"), call_for("roberta", "", "left")
    with torch.inference_mode():
        expected = model(**call).logits
        logits = torch.compile(encoder_fast.patch(model), backend="eager")(**call).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert "left padding" in reasons(model)


def dual_encoder() -> tuple[nn.Module, dict, str]:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    text = transformers.BertModel(config())
    image = transformers.CLIPVisionModel(vision)
    model = transformers.VisionTextDualEncoderModel(vision_model=image, text_model=text)
    return model, {"pixel_values": torch.randn(4, 3, 8, 8, device=DEVICE)}, "logits_per_text"


def encoder_decoder() -> tuple[nn.Module, dict, str]:
    decoder = transformers.BertLMHeadModel(config(is_decoder=True, add_cross_attention=True))
    model = transformers.EncoderDecoderModel(encoder=tiny(), decoder=decoder)
    return model, {"decoder_input_ids": torch.ones(4, 3, dtype=torch.long, device=DEVICE)}, "logits"


def dpr() -> tuple[nn.Module, dict, str]:
    sizes = config().to_dict()
    return transformers.DPRQuestionEncoder(transformers.DPRConfig(**sizes)), {}, "pooler_output"


@pytest.mark.parametrize("build", [dual_encoder, encoder_decoder, dpr])
def test_models_of_transformers_around_an_encoder(build: Callable) -> None:
    model, extra, field = build()
    model = model.to(DEVICE).eval()
    encoders = [m for m in model.modules() if type(m).__name__ == "BertModel"]
    for kind in ("right", "mixed"):
        call = {**inputs(kind), **extra}
        with torch.inference_mode():
            expected = getattr(model(**call), field)
            output = getattr(encoder_fast.patch(model)(**call), field)
        real = call["attention_mask"].any(dim=1)
        torch.testing.assert_close(output[real], expected[real], rtol=1e-3, atol=1e-3)
        fast = encoder_fast.report(model).encoders[0].fast_calls
        assert fast == (0 if build is dpr and kind == "mixed" else 1)
        encoder_fast.unpatch(model)
    assert encoders


def test_a_model_of_transformers_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model, extra, _ = dual_encoder()
    monkeypatch.setattr(readers, "_MASKING_MODELS", ())
    encoder_fast.patch(model.to(DEVICE).eval())
    with torch.inference_mode():
        model(**inputs("right"), **extra)
    assert "VisionTextDualEncoderModel, which is not known to ignore padding" in reasons(model)


@pytest.mark.parametrize("order", ["part first", "whole first"])
def test_copies_in_any_order(order: str, folder: str) -> None:
    model = encoder_fast.patch(sequence(folder, CNN(48, 16, [3]), Pooling(16)))
    before = model.encode(TEXTS)
    pair = [model[0].auto_model, model] if order == "part first" else [model, model[0]]
    clone = copy.deepcopy(pair)[1 if order == "part first" else 0]
    for _ in range(2):
        assert (clone.encode(TEXTS) == before).all()
        assert "padding under CNN" in reasons(clone)
        clone = copy.deepcopy(clone)


def test_a_copy_of_a_part_is_read_as_the_whole_was() -> None:
    model = encoder_fast.patch(Mean(tiny()))
    part = copy.deepcopy(model.encoder)
    with torch.inference_mode():
        part(**inputs("right"))
        part(**inputs("mixed"))
    (report,) = encoder_fast.report(part).encoders
    assert (report.fast_calls, set(report.zeros_to)) == (1, {"Mean", readers.CALLER})


def test_what_holds_an_encoder_is_not_kept_alive() -> None:
    model = encoder_fast.patch(Mean(tiny()))
    with torch.inference_mode():
        model(**inputs("right"))
    encoder, gone = model.encoder, weakref.ref(model)
    del model
    assert gone() is None
    with torch.inference_mode():
        encoder(**inputs("right"))
    assert readers.CALLER in encoder_fast.report(encoder).encoders[0].zeros_to


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForTokenClassification", "Model"])
def test_what_stands_above_modernvbert(head: str) -> None:
    """A loss over padding, and its own caller."""
    if not hasattr(transformers, "ModernVBertModel"):
        pytest.skip("this transformers has no ModernVBert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ModernVBertConfig(
        text_config={"vocab_size": 97, "intermediate_size": 32, "pad_token_id": 0, **sizes},
        vision_config={"image_size": 16, "patch_size": 8, "intermediate_size": 16, **sizes},
        image_token_id=96,
    )
    model = getattr(transformers, f"ModernVBert{head}")(config).to(DEVICE).eval()
    call = {name: inputs("right")[name] % 90 for name in ("input_ids", "attention_mask")}
    labels = {} if head == "Model" else {"labels": call["input_ids"] % 2}
    with torch.inference_mode():
        before = model(**call, **labels)[0]
        after = encoder_fast.patch(model)(**call, **labels)[0]
    (report,) = encoder_fast.report(model).encoders
    if head == "Model":
        assert (report.fast_calls, report.zeros_to) == (1, (readers.CALLER,))
    else:
        assert torch.equal(after, before)
        assert f"ModernVBert{head}, which is not known" in reasons(model)
