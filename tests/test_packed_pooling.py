"""SentenceTransformer.encode pools packed tokens, where nobody looks at the padded ones."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frozen_recorder
import pytest
import torch
from berts import DEVICE, minilm_path, tiny
from torch import Tensor, nn

import encoder_fast
from encoder_fast.parity import compare

st = pytest.importorskip("sentence_transformers")
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer  # noqa: E402

TEXTS = ["Hello world", "A much longer sentence about encoders, and about padding.", "", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import AutoTokenizer

    path = str(tmp_path_factory.mktemp("tiny"))
    tiny(vocab_size=30522).save_pretrained(path)
    AutoTokenizer.from_pretrained(minilm_path()).save_pretrained(path)
    return path


def build(folder: str, mode: object = "mean", *behind: nn.Module, **options: object) -> Any:
    modules = [Transformer(folder), Pooling(48, mode, **options), *behind]
    return st.SentenceTransformer(modules=modules, device=DEVICE)


def encode(model: nn.Module, **options: object) -> Tensor:
    return model.encode(TEXTS, convert_to_tensor=True, **options)


def pooled(model: nn.Module) -> int:
    """How many calls pooled packed tokens; all of them must have run fast."""
    report = encoder_fast.report(model)
    assert report.fallbacks == {}
    assert report.fast_calls > 0
    return report.encoders[0].pooled_calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["cls", "mean", "max", ("max", "cls", "mean")], ids=str)
def test_same_embeddings(folder: str, mode: object, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    width = 48 * (1 if isinstance(mode, str) else len(mode))
    model = build(folder, mode, Dense(width, 7), Normalize()).to(dtype)
    before = encode(model)
    exact = encode(copy.deepcopy(model).double())
    encoder_fast.patch(model)
    after = encode(model)
    assert pooled(model) == 1
    assert "pooled without padding: 1" in str(encoder_fast.report(model))
    assert after.dtype == before.dtype
    row = compare("embeddings", after, before, exact)
    assert row.ok, row
    assert torch.equal(encode(encoder_fast.unpatch(model)), before)


@pytest.mark.parametrize("mode", ["cls", ("max", "mean")], ids=str)
def test_through_cuda_graphs(folder: str, mode: object, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen_recorder.install(monkeypatch)
    model = build(folder, mode)
    before, exact = encode(model), encode(copy.deepcopy(model).double())
    encoder_fast.patch(model, "reference", cuda_graphs=True)
    for _ in range(3):
        row = compare("embeddings", encode(model), before, exact)
        assert row.ok, row
    assert pooled(model) == 3
    graphs = encoder_fast.report(model).encoders[0].graphs
    assert graphs is not None and (graphs.recorded, graphs.replayed) == (1, 2)


def test_cls_computes_the_first_token_alone(folder: str, rows: list[int]) -> None:
    encode(encoder_fast.patch(build(folder, "cls")))
    assert rows[-1] == len(TEXTS) < rows[0]
    encode(encoder_fast.patch(build(folder, ("cls", "mean"))))
    assert rows[-1] > len(TEXTS)


def _hook(find: Callable[[Any], nn.Module]) -> Callable[[Any], object]:
    return lambda model: find(model).register_forward_hook(lambda *_: None)


class Reader(nn.Module):
    """A user's own module, which reads the tokens' states."""

    def forward(self, features: dict) -> dict:
        features["sentence_embedding"] = features["token_embeddings"][:, 0]
        return features


def _replace_forward(model: Any) -> None:
    forward = model[1].forward
    model[1].forward = lambda features: forward(features)


def _pad_left(model: Any) -> None:
    model[1].pooling_mode = "cls"
    model.tokenizer.padding_side = "left"


USUAL: dict[str, Callable[[Any], object]] = {
    "hook_container": _hook(lambda model: model),
    "hook_transformer": _hook(lambda model: model[0]),
    "hook_encoder": _hook(lambda model: model[0].auto_model),
    "hook_pooler": _hook(lambda model: model[0].auto_model.pooler.dense),
    "hook_pooling": _hook(lambda model: model[1]),
    "hook_normalize": _hook(lambda model: model[2]),
    "other_mode": lambda model: setattr(model[1], "pooling_mode", "weightedmean"),
    "one_mode_of_others": lambda model: setattr(model[1], "pooling_mode", ("mean", "lasttoken")),
    "prompt_left_out": lambda model: model.set_pooling_include_prompt(False),
    "reader": lambda model: model.append(Reader()),
    "forward_replaced": _replace_forward,
    "left_padding": _pad_left,
}


@pytest.mark.parametrize("change", USUAL)
def test_the_usual_way_where_somebody_looks(folder: str, change: str) -> None:
    model = build(folder, "mean", Normalize())
    encoder_fast.patch(model)
    encode(model)
    assert pooled(model) == 1
    USUAL[change](model)
    after = encode(model, prompt="query: ")
    assert pooled(model) == 1
    before = encode(encoder_fast.unpatch(model), prompt="query: ")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_whoever_asks_for_token_embeddings_gets_them(folder: str) -> None:
    model = build(folder)
    encoder_fast.patch(model)
    lengths = [len(tokens) for tokens in model.encode(TEXTS, output_value="token_embeddings")]
    assert lengths == [len(ids) for ids in model.tokenizer(TEXTS)["input_ids"]]
    everything = model.encode(TEXTS, output_value=None)
    assert {"token_embeddings", "sentence_embedding"} <= everything[0].keys()
    features = {n: t.to(DEVICE) for n, t in model.tokenize(TEXTS).items() if torch.is_tensor(t)}
    with torch.inference_mode():
        assert model(features)["token_embeddings"].shape[:2] == features["input_ids"].shape
    assert pooled(model) == 0


def test_the_original_forward_is_pooled_as_ever(folder: str) -> None:
    model = build(folder, "max")
    before = encode(model)
    encoder_fast.patch(model)
    model[0].auto_model.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert torch.equal(encode(model), before)
    report = encoder_fast.report(model)
    assert report.fast_calls == 0 and report.fallbacks


def test_copies_pickles_and_files(folder: str, tmp_path: Path) -> None:
    model = build(folder)
    classes = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    before = encode(model)
    encoder_fast.patch(model)
    after = encode(model)
    assert list(model.state_dict()) == keys
    clone = copy.deepcopy(model)
    assert torch.equal(encode(clone), after)
    assert pooled(clone) == 1
    loaded = pickle.loads(pickle.dumps(model))
    assert [type(module) for module in loaded.modules()] == classes
    assert torch.equal(encode(loaded), before)
    model.save(str(tmp_path))
    types = [part["type"] for part in json.loads((tmp_path / "modules.json").read_text())]
    assert [name.rsplit(".", 1)[-1] for name in types] == ["Transformer", "Pooling"]
    assert torch.equal(encode(st.SentenceTransformer(str(tmp_path), device=DEVICE)), before)
    before_block = pooled(model)
    with encoder_fast.patched(model):
        assert torch.equal(encode(model), after)
    assert torch.equal(encode(model), after)
    assert pooled(model) == before_block + 1
    encoder_fast.unpatch(model)
    assert [type(module) for module in model.modules()] == classes
