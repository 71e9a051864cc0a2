"""A model's files are not trusted: they run no code, read nothing outside, and no key is dropped.

What a file may not say is refused with the file's name and the key's.
"""

import builtins
import json
import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from berts import config
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from model_folders import HOME, VOCABULARY, Files, cross_model, modules, put, save, sentence_model

from encoder_fast import ModelFilesError, TextEncoder
from encoder_fast.cli.checkpoint import Checkpoint
from encoder_fast.cli.errors import UserError
from encoder_fast.text.files import check_tokenizer_files, find_file
from encoder_fast.text.rerank import activate
from encoder_fast.text.settings import read_settings


def refused(path: str, *words: str) -> None:
    with pytest.raises(ModelFilesError) as caught:
        TextEncoder.from_pretrained(path, device="cpu")
    for word in words:
        assert word in str(caught.value)


POOLED: Files = {"1_Pooling__config": {"word_embedding_dimension": 48, "pooling_mode": "cls"}}


# --- code ---


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}, {"weights_only": False}])
def test_a_pickle_in_the_folder_does_not_run(tmp_path: Path, options: Files) -> None:
    folder, mark = tmp_path / "model", tmp_path / "ran"
    path = sentence_model(folder, model_args=options)
    (folder / "model.safetensors").unlink()
    torch.save({"payload": Payload(mark)}, folder / "pytorch_model.bin")
    told = json.loads((folder / "config.json").read_text())
    # without a dtype there, transformers looks into the weights for it
    put(folder, config={key: told[key] for key in told if not key.endswith("dtype")})
    if "weights_only" in options:
        refused(path, "weights_only")
    else:
        # version 4 of transformers raises an OSError for weights that it can't read
        with pytest.raises((ModelFilesError, OSError)):
            TextEncoder.from_pretrained(path, device="cpu")
    assert not mark.exists()


@pytest.fixture
def coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model's folder with code in it, whose user says yes to every question."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    folder = tmp_path / "model"
    sentence_model(folder)
    for place in ("own.py", "custom_generate/generate.py"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(
            f"import os; os.mkdir({str(tmp_path / 'ran')!r})\ngenerate = lambda model: None"
        )
    (folder / "custom_generate").rename(folder / "code")
    yield folder
    assert not asked
    assert not (tmp_path / "ran").exists()


def told_besides(folder: Path, **more: object) -> str:
    told = json.loads((folder / "config.json").read_text())
    return put(folder, config={**told, **more})


def test_nobody_is_asked_whether_code_may_run(coded: Path) -> None:
    auto = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    put(coded, sentence_bert_config={"model_args": {"trust_remote_code": True}})
    refused(told_besides(coded, model_type="own", auto_map=auto), "config.json", "trust_remote")
    told_besides(coded, model_type="bert")
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    path = put(coded, tokenizer_config=own, sentence_bert_config={})
    try:
        TextEncoder.from_pretrained(path, device="cpu")
    except ModelFilesError as error:
        assert "tokenizer" in str(error)


@pytest.mark.parametrize(
    "name",
    [
        *("AutoModelForDepthEstimation", "AutoImageProcessor", "AutoModel", "AutoTokenizer"),
        *("BertModel", "RagTokenizer", "pipeline", "__class__", 7, ["BertTokenizer"]),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config", "config"])
def test_what_is_called_a_tokenizer_is_one(coded: Path, file: str, name: object) -> None:
    auto = {"AutoModelForDepthEstimation": "own.Model", "AutoImageProcessor": "own.Model"}
    put(coded, preprocessor_config={"auto_map": auto, "image_processor_type": "Own"})
    path = told_besides(coded, auto_map=auto)
    if file == "config":
        (coded / "tokenizer_config.json").unlink()
        told_besides(coded, tokenizer_class=name)
    else:
        put(coded, tokenizer_config={"tokenizer_class": name})
    refused(path, f"{file}.json", "tokenizer_class", str(name))
    model = transformers.BertModel(config())
    with pytest.raises(ModelFilesError, match="tokenizer_class"):
        TextEncoder.from_pretrained(model, tokenizer=path)


def test_a_model_inside_of_a_model_brings_no_code(coded: Path) -> None:
    small = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "image_size": 8}
    inner = {
        "model_type": "encoder-decoder",
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "bert"},
        "tie_word_embeddings": False,
        "auto_map": {"AutoModel": "own.Model"},
        "_name_or_path": str(coded),
    }
    vision = {"model_type": "clip_vision_model", "patch_size": 4, "intermediate_size": 8, **small}
    outer = {"model_type": "vision-text-dual-encoder", "vision_config": vision}
    refused(put(coded, config={**outer, "text_config": inner}), "config.json", "auto_map")
    refused(put(coded, config={**outer, "parts": [[inner]]}), "config.json", "auto_map")


def test_code_for_generation_does_not_run(coded: Path) -> None:
    (coded / "code").rename(coded / "custom_generate")
    path = told_besides(coded, architectures=["BertLMHeadModel"])
    refused(path, "custom_generate/generate.py")
    with pytest.raises(UserError, match=r"generate\.py"):
        Checkpoint(path, "--model ", whole=True).load(torch.float32, "eager")


@pytest.mark.parametrize(
    "options",
    [
        {"attn_implementation": "somebody/kernel"},
        {"attn_implementation": "flash_attention_2"},
        {"use_kernels": True},
        {"kernel_config": {}},
        {"allow_all_kernels": True},
        {"quantization_config": {"load_in_8bit": True}},
        {"adapter_kwargs": {"subfolder": ".."}},
        {"subfolder": "../other"},
        {"variant": "/../../other/model"},
        {"gguf_file": "x.gguf"},
        {"cache_dir": "/"},
        {"proxies": {"https": "elsewhere"}},
        {"revision": "main"},
        {"state_dict": {}},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("name", ["model_args", "model_kwargs"])
def test_options_of_the_model_are_a_list(tmp_path: Path, name: str, options: Files) -> None:
    path = put(tmp_path, modules=modules("Transformer"), sentence_bert_config={name: options})
    refused(path, "sentence_bert_config.json", f"{name}.{next(iter(options))}")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tokenizer_args", {"vocab_file": "/etc/hostname"}),
        ("processor_kwargs", {"tokenizer_file": "../x"}),
        ("tokenizer_args", {"tokenizer_type": "rag"}),
        ("tokenizer_args", {"cache_dir": "/"}),
        ("tokenizer_args", {"model_max_length": "long"}),
        ("config_args", {"num_labels": 2}),
        ("config_kwargs", {"attn_implementation": "somebody/kernel"}),
    ],
)
def test_options_of_the_tokenizer_and_the_configuration_too(
    tmp_path: Path, name: str, options: Files
) -> None:
    path = put(tmp_path, modules=modules("Transformer"), sentence_bert_config={name: options})
    refused(path, "sentence_bert_config.json", f"{name}.{next(iter(options))}")


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel"},
        {"experts_implementation": "somebody/kernel"},
        {"text_config": {"attn_implementation": "somebody/kernel"}},
        {"quantization_config": {"quant_method": "fbgemm_fp8"}},
        {"transformers_weights": "../other/model.safetensors"},
        {"use_pretrained_backbone": True},
        {"architectures": "BertModel"},
        {"model_type": "timm_wrapper"},
        {"num_hidden_layers": 10**9},
        {"n_layers": 10**9},
        {"num_labels": 10**9},
        {"parts": [[{"attn_implementation": "somebody/kernel"}]]},
        {"model_type": ["bert"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_configuration_may_not_name(tmp_path: Path, change: Files) -> None:
    path = put(tmp_path, config={"model_type": "bert", **change})
    refused(path, "config.json", next(reversed(str(change).split("'")[1::2][:2])))


@pytest.mark.parametrize("name", ["os.system", "evil.Sigmoid", "torch.hub.load", "Sigmoid", 7])
def test_an_activation_is_no_import(tmp_path: Path, name: object) -> None:
    refused(cross_model(tmp_path, activation_fn=name), "config_sentence", "activation_fn")
    # where older versions note it
    for key, value in (
        ("sentence_transformers", {"activation_fn": name}),
        ("sbert_ce_default_activation_function", name),
    ):
        with pytest.raises(ModelFilesError, match="activation_fn"):
            activate(torch.zeros(2, 1), None, config(**{key: value}))


@pytest.mark.parametrize(
    "kind", ["os.system", "own.Pooling", f"{HOME}.Router", f"{HOME}.Dense", "Pooling"]
)
def test_a_module_is_no_import(tmp_path: Path, kind: str) -> None:
    entries = modules("Transformer", "Pooling")
    entries[1]["type"] = kind
    refused(put(tmp_path, modules=entries), kind.rsplit(".", 1)[-1])


# --- places ---


@pytest.mark.parametrize("number", [0, 1], ids=["transformer", "pooling"])
@pytest.mark.parametrize(
    "place",
    [
        "https://elsewhere/other",
        "../other",
        "a/../../other",
        "/other",
        "C:\\other",
        "..\\other",
        "~",
        "a\0b",
        3,
        None,
    ],
)
def test_a_module_stays_in_the_folder(tmp_path: Path, number: int, place: object) -> None:
    entries = modules("Transformer", "Pooling")
    entries[number]["path"] = place
    path = put(tmp_path, modules=entries, config={})
    refused(path, "modules.json", "path")
    with pytest.raises(UserError, match=r"modules\.json"):
        Checkpoint(path, "--model ")


def test_weights_stay_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(tmp_path / "other")
    path = save(folder)
    (folder / "model.safetensors").unlink()
    names = dict.fromkeys(
        transformers.BertModel(config()).state_dict(), "../other/model.safetensors"
    )
    put(folder, **{"model.safetensors.index": {"metadata": {}, "weight_map": names}})
    refused(path, "model.safetensors.index.json", "leaves the model's folder")


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        *(("vocab_file", "{}"), ("vocab", "{}"), ("init_inputs", ["{}"]), ("own", {"a": "{}"})),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_a_vocabulary_stays_in_the_folder(
    tmp_path: Path, file: str, key: str, shape: object
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(VOCABULARY))
    path = save(tmp_path / "model")

    def name(place: object) -> None:
        value = json.loads(json.dumps(shape).replace("{}", str(place)))
        put(tmp_path / "model", **{file: {"tokenizer_class": "BertTokenizer", key: value}})

    name(other)
    refused(path, f"{file}.json", key)
    with pytest.raises(ModelFilesError, match=file):
        TextEncoder.from_pretrained(transformers.BertModel(config()), tokenizer=path)
    name(tmp_path / "model" / ".." / "other.txt")
    refused(path, f"{file}.json", key)
    # what the author's machine had, and this one has not, is in many a folder
    name("/no/such/file")
    check_tokenizer_files(path, "")
    name(tmp_path / "model" / "vocab.txt")
    check_tokenizer_files(path, "")


def test_a_tokenizers_other_files_stay_in_the_folder(tmp_path: Path) -> None:
    for key, value in (
        ("sp_model_kwargs", {"model_file": "x"}),
        ("fast_tokenizer_files", ["../other/tokenizer.4.0.0.json"]),
        ("fast_tokenizer_files", ["..\\other\\tokenizer.4.0.0.json"]),
        ("gguf_file", "../other/model.gguf"),
    ):
        refused(put(tmp_path, tokenizer_config={key: value}), "tokenizer_config.json", key)
    put(tmp_path, tokenizer_config={"fast_tokenizer_files": ["tokenizer.4.0.0.json"]})
    check_tokenizer_files(str(tmp_path), "")
    # tokens and templates are no names of files, whatever lies in the working directory
    put(tmp_path, tokenizer_config={"unk_token": __file__, "chat_template": __file__})
    check_tokenizer_files(str(tmp_path), "")


def test_an_adapter_is_refused_by_name(tmp_path: Path) -> None:
    path = sentence_model(tmp_path)
    put(tmp_path, adapter_config={"base_model_name_or_path": "../other", "peft_type": "LORA"})
    refused(path, "adapter_config.json")


def test_links_are_followed_as_in_a_hub_cache(tmp_path: Path) -> None:
    sentence_model(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    whole = TextEncoder.from_pretrained(tmp_path / "blobs", device="cpu").encode("a b")
    assert np.array_equal(TextEncoder.from_pretrained(snapshot, device="cpu").encode("a b"), whole)


# --- shapes ---

SHAPES = ["", "{", "null", "7", '"x"', "[" * 100_000, "\x00", '{"a": NaN}', '{"a": 1, "a": 2}']


@pytest.mark.parametrize("content", [*SHAPES, "[]", "[7]", "{}", "[[]]", '[{"path": ""}]'])
def test_odd_modules(tmp_path: Path, content: str) -> None:
    refused(put(tmp_path, modules=content.replace('{"a"', '[{"a"')), "modules.json")


@pytest.mark.parametrize("name", ["config_sentence_transformers", "sentence_bert_config"])
@pytest.mark.parametrize("content", [*SHAPES, "[]"])
def test_odd_files(tmp_path: Path, name: str, content: str) -> None:
    path = put(tmp_path, modules=modules("Transformer"), **{name: content})
    refused(path, f"{name}.json")


@pytest.mark.parametrize("name", ["special_tokens_map", "added_tokens", "tokenizer"])
@pytest.mark.parametrize("content", ["", "7", "[7]", '{"mask_token": [[7]]'])
def test_odd_files_of_a_tokenizer(tmp_path: Path, name: str, content: str) -> None:
    refused(save(tmp_path, **{name: content}), f"{name}.json")


def test_a_key_given_twice_is_the_last_for_transformers(tmp_path: Path) -> None:
    path = save(tmp_path)
    told = (tmp_path / "config.json").read_text()
    put(tmp_path, config=told.replace("{", '{"hidden_size": 7,', 1))
    assert TextEncoder.from_pretrained(path, device="cpu").dimension == 48


@pytest.mark.parametrize("name", ["config", "tokenizer_config", "model.safetensors.index"])
@pytest.mark.parametrize("content", [*SHAPES[:6], "[]"])
def test_odd_files_of_transformers(tmp_path: Path, name: str, content: str) -> None:
    refused(put(tmp_path, **{name: content}), f"{name}.json")


def test_a_file_that_is_no_utf_8(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_bytes(b'[{"path": "\xff"}]')
    refused(str(tmp_path), "modules.json")


@pytest.mark.parametrize(
    "change", [{"hidden_size": "wide"}, {"hidden_size": [8]}, {"hidden_act": "evil"}]
)
def test_odd_values_in_the_configuration(tmp_path: Path, change: Files) -> None:
    path = save(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    put(tmp_path, config={**told, **change})
    refused(path, str(tmp_path), "can't be loaded")


@pytest.mark.parametrize(
    "change", [{"model_max_length": "long"}, {"model_max_length": 0}, {"model_input_names": 7}]
)
def test_odd_values_in_the_tokenizers_file(tmp_path: Path, change: Files) -> None:
    refused(put(tmp_path, tokenizer_config=change), "tokenizer_config.json", next(iter(change)))


def test_labels_without_a_name(tmp_path: Path) -> None:
    path = save(tmp_path, "BertForSequenceClassification")
    told = json.loads((tmp_path / "config.json").read_text())
    put(tmp_path, config={**told, "id2label": {"3": "far"}, "label2id": {"far": 3}})
    with pytest.raises(ModelFilesError, match="id2label"):
        TextEncoder.from_pretrained(path, device="cpu").classify("a")


def test_two_modules_of_one_name(tmp_path: Path) -> None:
    entries = modules("Transformer", "Pooling")
    entries[1]["name"] = "0"
    refused(put(tmp_path, modules=entries), "modules.json", "two modules of one name")


# --- files that are missing ---


@pytest.mark.parametrize("content", [None, {}])
def test_a_pooling_that_says_nothing(tmp_path: Path, content: object) -> None:
    path = sentence_model(tmp_path)
    put(tmp_path, **{"1_Pooling__config": content or {}})
    if content is None:
        (tmp_path / "1_Pooling" / "config.json").unlink()
    refused(path, "1_Pooling/config.json", "pooling=")
    assert read_settings(path, "max").pooling == "max"


def test_a_folder_of_a_module_that_is_not_there(tmp_path: Path) -> None:
    entries = modules("Transformer", "Pooling")
    entries[0]["path"] = "0_Transformer"
    path = sentence_model(tmp_path)
    refused(put(tmp_path, modules=entries), path, "0_Transformer/config.json", "modules.json")


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing about a file, and the settings are not guessed."""

    def hub(error: Exception) -> None:
        def download(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", download)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub(LocalEntryNotFoundError("no connection"))
    with pytest.raises(OSError, match=r"modules\.json of someone/model can't be fetched"):
        read_settings("someone/model", None)
    # what it has said before is in its cache
    known = huggingface_hub.file_download._CACHED_NO_EXIST
    with monkeypatch.context() as cache:
        cache.setattr(huggingface_hub.file_download, "try_to_load_from_cache", lambda *_: known)
        assert find_file("someone/model", "modules.json") is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_file("someone/model", "modules.json") is None
    hub(EntryNotFoundError("404"))
    assert find_file("someone/model", "modules.json") is None
    hub(OSError(28, "the disk is full"))
    with pytest.raises(OSError, match="disk is full"):
        find_file("someone/model", "modules.json")


# --- keys ---


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("sentence_bert_config", {"max_seq_length": "9"}),
        ("sentence_bert_config", {"max_seq_length": 0}),
        ("sentence_bert_config", {"max_seq_length": True}),
        ("sentence_bert_config", {"do_lower_case": "no"}),
        ("sentence_bert_config", {"model_args": ["dtype"]}),
        ("sentence_bert_config", {"model_args": {"dtype": "load"}}),
        ("sentence_bert_config", {"query_length": 8}),
        ("sentence_bert_config", {"query_expansion": {"length": 8}}),
        ("sentence_bert_config", {"tokenizer_name_or_path": "other"}),
        ("sentence_bert_config", {"transformer_task": "fill-mask"}),
        ("sentence_bert_config", {"module_output_name": "causal_logits"}),
        ("sentence_bert_config", {"modality_config": {"message": {}}}),
        ("sentence_bert_config", {"modality_config": {"text": {"method": "eval"}}}),
        ("sentence_bert_config", {"processing_kwargs": {"text": {"truncation": False}}}),
        ("sentence_bert_config", {"processing_kwargs": {"text": {"truncation": None}}}),
        ("sentence_bert_config", {"processing_kwargs": {"common": {"truncation": None}}}),
        ("sentence_bert_config", {"processing_kwargs": {"text": {"add_special_tokens": None}}}),
        ("sentence_bert_config", {"processing_kwargs": {"common": {"return_tensors": None}}}),
        ("sentence_bert_config", {"processing_kwargs": {"text": {"padding_side": "left"}}}),
        ("sentence_bert_config", {"tokenizer_args": {"padding_side": "left"}}),
        ("sentence_bert_config", {"processor_kwargs": {"model_max_length": None}}),
        ("sentence_bert_config", {"processor_kwargs": {"do_lower_case": None}}),
        ("sentence_bert_config", {"tokenizer_args": {"truncation_side": None}}),
        ("sentence_bert_config", {"model_args": {"dtype": None}}),
        ("sentence_bert_config", {"processing_kwargs": {"text": {"stride": 3}}}),
        ("sentence_bert_config", {"processing_kwargs": {"common": {"add_special_tokens": False}}}),
        ("sentence_bert_config", {"processing_kwargs": {"txet": {}}}),
        ("sentence_bert_config", {"new_in_version_7": None}),
        ("config_sentence_transformers", {"model_type": "SparseEncoder"}),
        ("config_sentence_transformers", {"model_type": ["SentenceTransformer"]}),
        ("config_sentence_transformers", {"activation_fn": "torch.nn.Sigmoid"}),
        ("config_sentence_transformers", {"model_type": "MultiVectorEncoder"}),
        ("config_sentence_transformers", {"prompts": ["q: "]}),
        ("config_sentence_transformers", {"prompts": {"q": 3}}),
        ("config_sentence_transformers", {"default_prompt_name": "missing"}),
        ("config_sentence_transformers", {"truncate_dim": 0}),
        ("config_sentence_transformers", {"truncate_dim": 2.5}),
        ("config_sentence_transformers", {"similarity_fn_name": "maxsim"}),
        ("config_sentence_transformers", {"keep_in_fp32_modules": ["0.model.classifier"]}),
        ("config_sentence_transformers", {"requirements": {"transformers": ">=99"}}),
        ("config_sentence_transformers", {"new_in_version_7": False}),
        ("1_Pooling__config", {"pooling_mode": 4}),
        ("1_Pooling__config", {"pooling_mode": None}),
        ("1_Pooling__config", {"pooling_mode": []}),
        ("1_Pooling__config", {"include_prompt": False}),
        ("1_Pooling__config", {"include_prompt": None}),
        ("1_Pooling__config", {"new_in_version_7": 1}),
        ("2_Normalize__config", {"module_input_name": "token_embeddings"}),
        ("2_Normalize__config", {"module_input_name": None}),
    ],
)
def test_keys_are_refused_by_name(tmp_path: Path, file: str, content: Files) -> None:
    put(tmp_path, modules=modules("Transformer", "Pooling", "Normalize"), **POOLED)
    path = put(tmp_path, **{file: content})
    refused(path, f"{file.replace('__', '/')}.json", next(iter(content)))
