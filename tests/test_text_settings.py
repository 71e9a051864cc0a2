"""What TextEncoder reads from a model's files, and what it says of files that it can't use."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from berts import DEVICE, minilm_path, tiny

from encoder_fast import TextEncoder
from encoder_fast.text.settings import Settings, read_settings


def put(folder: Path, **files: object) -> str:
    """A folder of settings alone; ``a__b`` names the file ``a/b.json``."""
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return str(folder)


def modules(*kinds: str, first: str = "") -> list[dict]:
    paths = [first, *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], 1))]
    return [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]


def test_minilm() -> None:
    settings = read_settings(minilm_path(), None)
    assert (settings.pooling, settings.normalize, settings.max_length) == ("mean", True, 256)
    assert read_settings(minilm_path(), "cls").pooling == "cls"


def test_a_folder_without_settings(tmp_path: Path) -> None:
    assert read_settings(str(tmp_path), None) == Settings()
    assert read_settings(str(tmp_path), "max") == Settings(pooling="max")


def test_all_settings(tmp_path: Path) -> None:
    path = put(
        tmp_path,
        modules=modules("Transformer", "Pooling", "Normalize", first="0_Transformer"),
        **{
            "0_Transformer__sentence_bert_config": {"max_seq_length": 99, "do_lower_case": True},
            "1_Pooling__config": {"embedding_dimension": 8, "pooling_mode": "cls"},
        },
        config_sentence_transformers={
            "prompts": {"query": "q: ", "document": None},
            "default_prompt_name": "query",
            "similarity_fn_name": "dot",
            "truncate_dim": 5,
        },
    )
    assert read_settings(path, None) == Settings(
        pooling="cls",
        normalize=True,
        max_length=99,
        lower_case=True,
        prompts={"query": "q: ", "document": ""},
        default_prompt="query",
        truncate_dim=5,
        similarity="dot",
        subfolder="0_Transformer",
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules": modules("Transformer", "Pooling", "Dense")}, "module Dense"),
        (
            {
                "modules": modules("Transformer", "Pooling"),
                "1_Pooling__config": {"pooling_mode_lasttoken": True},
            },
            "pools by lasttoken",
        ),
        (
            {
                "modules": modules("Transformer", "Pooling"),
                "1_Pooling__config": {"pooling_mode": ["cls", "mean"]},
            },
            "pools by cls and mean",
        ),
        (
            {
                "modules": modules("Transformer", "Pooling"),
                "1_Pooling__config": {"pooling_mode": "mean", "include_prompt": False},
            },
            "include_prompt = False",
        ),
        (
            {
                "modules": modules("Transformer"),
                "config_sentence_transformers": {"similarity_fn_name": "manhattan"},
            },
            "similarity_fn_name = 'manhattan'",
        ),
    ],
    ids=["dense", "last-token", "two-poolings", "prompt-left-out", "similarity"],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, files: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(put(tmp_path, **files), None)


def test_the_pooling_may_be_chosen_in_its_place(tmp_path: Path) -> None:
    path = put(
        tmp_path,
        modules=modules("Transformer", "Pooling"),
        **{"1_Pooling__config": {"pooling_mode_lasttoken": True}},
    )
    assert read_settings(path, "mean").pooling == "mean"


def test_a_folder_in_parts(tmp_path: Path) -> None:
    """The transformer in a subfolder, texts made lower case, a default prompt."""
    inner = tmp_path / "0_Transformer"
    inner.mkdir()
    for file in Path(minilm_path()).iterdir():
        if file.suffix == ".txt" or file.name.startswith(("config.", "model.", "token")):
            (inner / file.name).symlink_to(file)
    path = put(
        tmp_path,
        modules=modules("Transformer", "Pooling", first="0_Transformer"),
        **{
            "0_Transformer__sentence_bert_config": {"max_seq_length": 32, "do_lower_case": True},
            "1_Pooling__config": {"pooling_mode": "max"},
        },
        config_sentence_transformers={"prompts": {"p": "about "}, "default_prompt_name": "p"},
    )
    ours = TextEncoder.from_pretrained(path, device=DEVICE)
    assert ours.max_length == 32
    assert np.array_equal(ours.encode("PARIS"), ours.encode("paris"))
    assert np.array_equal(ours.encode("x"), ours.encode("about x", prompt=""))
    assert not np.array_equal(ours.encode("x"), ours.encode("x", prompt=""))


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        TextEncoder.from_pretrained(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="without a tokenizer"):
        TextEncoder.from_pretrained(tiny())
    with pytest.raises(ValueError, match="holds no Hugging Face model"):
        TextEncoder.from_pretrained(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pooling must be one of"):
        TextEncoder.from_pretrained(minilm_path(), pooling="sum")
    with pytest.raises(ValueError, match="dtype must be"):
        TextEncoder.from_pretrained(minilm_path(), dtype="int8")
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer that can be loaded"):
        TextEncoder.from_pretrained(tmp_path)


def test_positions_that_begin_after_the_padding() -> None:
    """RoBERTa's limit and positions: as many inputs as the table serves, each as if alone."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=400,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=64,
        max_position_embeddings=40,
        pad_token_id=0,
    )
    model = transformers.RobertaModel(config).eval().to(DEVICE)
    tokenizer = transformers.ByT5Tokenizer()
    ours = TextEncoder.from_pretrained(model, tokenizer, pooling="mean")
    assert ours.max_length == 39
    texts = ["a", "quite long, but it fits", "much too long " * 10]
    with pytest.warns(UserWarning, match="1 of 3 texts"):
        vectors = ours.encode(texts)
    assert ours.report().padded_batches == 0
    for text, vector in zip(texts, vectors, strict=True):
        inputs = tokenizer(text, truncation=True, max_length=39, return_tensors="pt").to(DEVICE)
        with torch.inference_mode():
            alone = model(**inputs).last_hidden_state.mean(dim=1)[0].cpu()
        assert np.allclose(vector, alone, atol=1e-5)
