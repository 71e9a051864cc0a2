"""What the keys of a model's files do, held against sentence-transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from model_folders import Files, cross_model, put, save, sentence_model
from torch import nn

import encoder_fast
from encoder_fast import ModelFilesError, TextEncoder
from encoder_fast.text import keys
from encoder_fast.text.settings import model_kind

st = pytest.importorskip("sentence_transformers")

TEXTS = ["a stone wall was built", "Rain", "", "in the harbour after the storm came down"]


def test_each_key_of_the_library_is_in_the_table(tmp_path: Path) -> None:
    """A key that a newer version writes must be looked at before it is let pass."""
    parts = list(st.SentenceTransformer(sentence_model(tmp_path / "s"), device="cpu"))
    parts.append(st.models.Normalize())
    for part in parts:
        names = {*getattr(part, "config_keys", ()), *getattr(part, "get_config_dict", dict)()}
        assert names <= keys.MODULES[type(part).__name__].keys()
    for model in (
        st.SentenceTransformer(str(tmp_path / "s"), device="cpu"),
        st.CrossEncoder(cross_model(tmp_path / "c"), device="cpu"),
    ):
        saved = tmp_path / type(model).__name__
        model.save_pretrained(str(saved))
        TextEncoder.from_pretrained(str(saved), device="cpu")
        if (saved / "config_sentence_transformers.json").exists():
            whole = json.loads((saved / "config_sentence_transformers.json").read_text())
            assert whole.keys() <= keys.WHOLE[type(model).__name__].keys()


def same_vectors(path: str) -> TextEncoder:
    theirs = st.SentenceTransformer(path, device="cpu").encode(TEXTS)
    ours = TextEncoder.from_pretrained(path, device="cpu")
    assert np.allclose(ours.encode(TEXTS), theirs, atol=1e-5)
    return ours


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize(
    ("transformer", "length"),
    [
        ({"max_seq_length": 9}, 9),
        ({"max_seq_length": 20, "tokenizer_args": {"model_max_length": 9}}, 9),
        ({"tokenizer_args": {"truncation_side": "left"}, "max_seq_length": 9}, 9),
        ({"do_lower_case": True}, 60),
        ({"model_args": {"add_pooling_layer": False, "attn_implementation": "eager"}}, 60),
    ],
    ids=str,
)
def test_keys_are_honoured(tmp_path: Path, transformer: Files, length: int) -> None:
    assert same_vectors(sentence_model(tmp_path, **transformer)).max_length == length


six = pytest.mark.skipif(int(st.__version__.split(".")[0]) < 6, reason="new in version 6")


@six
@pytest.mark.filterwarnings("ignore:.*were cut")
def test_the_tokenizers_call_is_honoured_in_pairs(tmp_path: Path) -> None:
    path = cross_model(tmp_path)
    told = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    put(tmp_path, sentence_bert_config={**told, "processing_kwargs": {"text": {"max_length": 12}}})
    same_files(path)


@six
@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize(
    ("call", "length"),
    [
        ({"text": {"max_length": 9}}, 9),
        ({"text": {"max_length": 30, "padding": "max_length"}}, 30),
        ({"text": {"max_length": 30}, "common": {"max_length": 8}}, 8),
        ({"image": {"size": 3}, "chat_template": {"add_generation_prompt": True}}, 20),
    ],
    ids=str,
)
def test_the_tokenizers_call_is_honoured(tmp_path: Path, call: Files, length: int) -> None:
    path = sentence_model(tmp_path, max_seq_length=20, processing_kwargs=call)
    assert same_vectors(path).max_length == length
    live = st.SentenceTransformer(path, device="cpu")
    assert TextEncoder.from_pretrained(live).max_length == length


def test_prompts_that_are_empty_or_called_as_one_another(tmp_path: Path) -> None:
    prompts = {"query": "document", "document": "x ", "none": None}
    path = sentence_model(tmp_path, {"prompts": prompts, "default_prompt_name": "query"})
    ours = same_vectors(path)
    assert np.array_equal(ours.encode("a b", prompt="none"), ours.encode("a b", prompt=""))


# --- cross-encoders ---

QUERY, DOCUMENTS = "when does it open", ["a cat sat", "the office opens at nine", "trains leave"]


def same_ranking(theirs: object, ours: TextEncoder) -> None:
    """In float64, where only a setting makes a difference that a float32 score could show."""
    ranked = theirs.rank(QUERY, DOCUMENTS)
    found = ours.rerank(QUERY, DOCUMENTS)
    assert [one.index for one in found] == [one["corpus_id"] for one in ranked]
    assert [one.score for one in found] == pytest.approx([one["score"] for one in ranked], rel=1e-6)


def same_files(path: str) -> None:
    same_ranking(
        st.CrossEncoder(path, device="cpu").double(),
        TextEncoder.from_pretrained(path, device="cpu", dtype="float64"),
    )


@six
@pytest.mark.parametrize("name", sorted({*keys.ACTIVATIONS}))
def test_the_activation_that_the_files_name(tmp_path: Path, name: str) -> None:
    same_files(cross_model(tmp_path, activation_fn=name))


@six
def test_a_cross_encoders_prompt(tmp_path: Path) -> None:
    prompts = {"ask": "query ", "other": "zzzzz "}
    path = cross_model(tmp_path, prompts=prompts, default_prompt_name="ask")
    same_files(path)
    ours = TextEncoder.from_pretrained(path, device="cpu")
    assert ours.rerank("query a", DOCUMENTS, prompt="") == ours.rerank("a", DOCUMENTS)
    assert ours.rerank("a", DOCUMENTS, prompt="other") != ours.rerank("a", DOCUMENTS)
    # and it is for rerank alone: as vectors its texts have none
    assert np.array_equal(ours.encode("a"), ours.encode("a", prompt=""))


def test_the_prompts_of_embeddings_are_not_for_rerank(tmp_path: Path) -> None:
    path = cross_model(
        tmp_path, model_type="SentenceTransformer", prompts={"q": "zz "}, default_prompt_name="q"
    )
    ours = TextEncoder.from_pretrained(path, device="cpu")
    assert ours.rerank("a", DOCUMENTS) == ours.rerank("a", DOCUMENTS, prompt="")
    assert not np.array_equal(ours.encode("a"), ours.encode("a", prompt=""))


class Halved(nn.Module):
    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return scores / 2


@pytest.mark.parametrize("activation", [nn.Identity(), nn.Tanh(), Halved(), lambda x: x * 3])
def test_a_live_cross_encoder(tmp_path: Path, activation: object) -> None:
    path = save(tmp_path, "BertForSequenceClassification")
    theirs = st.CrossEncoder(path, device="cpu", activation_fn=activation).double()
    same_ranking(theirs, TextEncoder.from_pretrained(theirs))


@six
def test_a_live_cross_encoders_prompt(tmp_path: Path) -> None:
    path = save(tmp_path, "BertForSequenceClassification")
    prompts = {"prompts": {"q": "query "}, "default_prompt_name": "q"}
    theirs = st.CrossEncoder(path, device="cpu", **prompts).double()
    same_ranking(theirs, TextEncoder.from_pretrained(theirs))


# --- live models ---


def test_a_subclass_is_read_as_its_kind(tmp_path: Path) -> None:
    class Mine(st.SentenceTransformer):
        pass

    whole = {"prompts": {"q": "query "}, "default_prompt_name": "q", "truncate_dim": 7}
    theirs = Mine(sentence_model(tmp_path, whole), device="cpu")
    expected = theirs.encode(TEXTS)
    assert np.allclose(TextEncoder.from_pretrained(theirs).encode(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["SparseEncoder", "MultiVectorEncoder"])
def test_what_embeds_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    if not hasattr(st, name):
        pytest.skip("not in this version")
    path = save(tmp_path, "BertForMaskedLM")
    model = getattr(st, name)(path, device="cpu")
    with pytest.raises(ModelFilesError, match=name):
        model_kind(model)
    with pytest.raises(ModelFilesError, match=name):
        TextEncoder.from_pretrained(model)


def hooked(model: nn.Module) -> str:
    model[1].register_forward_hook(lambda *_: None)
    return "hook on this Pooling"


def prepared(model: nn.Module) -> str:
    own = "preprocess" if hasattr(model[0], "preprocess") else "tokenize"
    whole = getattr(model[0], own)
    setattr(model[0], own, lambda texts, **options: whole(texts, **options))
    return f"{own} of this Transformer"


def overridden(model: nn.Module) -> str:
    class Mine(type(model)):
        def encode(self, sentences: list[str], **options: object) -> object:
            return super().encode(["query " + one for one in sentences], **options)

    model.__class__ = Mine
    return "encode of this Mine"


def pooled_otherwise(model: nn.Module) -> str:
    model[1].forward = lambda features: features
    return "forward of this Pooling"


@pytest.mark.parametrize("change", [hooked, prepared, overridden, pooled_otherwise])
@pytest.mark.parametrize("patched", [False, True])
def test_code_around_a_live_encoder_is_not_left_out(
    tmp_path: Path, change: Callable[[nn.Module], str], patched: bool
) -> None:
    model = st.SentenceTransformer(sentence_model(tmp_path), device="cpu")
    if patched:
        encoder_fast.patch(model)
    TextEncoder.from_pretrained(model)
    with pytest.raises(ModelFilesError, match=change(model)):
        TextEncoder.from_pretrained(model)


def test_a_method_replaced_in_the_librarys_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = st.SentenceTransformer(sentence_model(tmp_path), device="cpu")
    monkeypatch.setattr(type(model[1]), "forward", lambda self, features: features)
    with pytest.raises(ModelFilesError, match="forward of this Pooling"):
        TextEncoder.from_pretrained(model)


def test_a_module_of_the_users_is_refused(tmp_path: Path) -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertModel.from_pretrained(path)
            self.head = nn.Linear(48, 7)

    path = save(tmp_path)
    with pytest.raises(ModelFilesError, match="Projected"):
        TextEncoder.from_pretrained(Projected(), tokenizer=path)
    # a wrapper that adds nothing is looked through
    compiled = torch.compile(transformers.BertModel.from_pretrained(path))
    ours = TextEncoder.from_pretrained(compiled, tokenizer=path)
    assert np.array_equal(ours.encode(TEXTS), TextEncoder.from_pretrained(path).encode(TEXTS))


def test_virtual_tokens_are_not_left_out(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    path = sentence_model(tmp_path)
    kinds = {
        "virtual": peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4),
        "lora": peft.LoraConfig(task_type="FEATURE_EXTRACTION", init_lora_weights=False),
    }
    for name, kind in kinds.items():
        whole = st.SentenceTransformer(path, device="cpu")
        adapted = peft.get_peft_model(transformers.BertModel.from_pretrained(path), kind).eval()
        (held,) = whole[0]._modules  # called `model` or, before version 6, `auto_model`
        setattr(whole[0], held, adapted)
        if name == "virtual":
            for model in (adapted, whole):
                with pytest.raises(ModelFilesError, match="PeftModel"):
                    TextEncoder.from_pretrained(model, tokenizer=path)
        else:
            expected = whole.encode(TEXTS)
            for model in (adapted, whole):
                ours = TextEncoder.from_pretrained(model, tokenizer=path)
                assert np.allclose(ours.encode(TEXTS), expected, atol=1e-5)
