"""Every family: the same numbers under each head, dtype and mask, and the same model."""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from berts import DEVICE, DTYPES, inputs
from kernel_backends import model_backends
from torch import nn

import encoder_fast


def call_for(family: str, head: str, kind: str) -> dict:
    call = inputs(kind)
    if family in ("distilbert", "modernbert", "mpnet"):
        del call["token_type_ids"]
    if family in zoo.ROBERTAS:
        if "token_type_ids" in call:
            call["token_type_ids"].zero_()
        if "attention_mask" in call:
            # as a tokenizer pads; the positions go by the ids
            call["input_ids"][call["attention_mask"] == 0] = zoo.PAD
        # and one real token that happens to be the padding id, as users can pass
        call["input_ids"][0, 3] = zoo.PAD
    else:
        call["token_type_ids"] = call.pop("token_type_ids", None)
    if head == "ForMultipleChoice":
        call = {n: v if v is None else v.view(2, 2, -1) for n, v in call.items()}
    return {name: value for name, value in call.items() if value is not None}


TEXT_HEADS = (
    *("ForSequenceClassification", "ForMultipleChoice"),
    *("ForPreTraining", "ForNextSentencePrediction"),
)


def many_texts_for(family: str, head: str, kind: str) -> dict:
    """A call to judge the numbers by.

    A head for whole texts gives so few of them that their worst error is a matter of luck: by one
    call's four logits, PyTorch's own operations broke the rule. It gets 16 times as many texts.
    """
    calls = [call_for(family, head, kind) for _ in range(16 if head in TEXT_HEADS else 1)]
    return {name: torch.cat([one[name] for one in calls]) for name in calls[0]}


# A mask decides which tokens are packed, whatever their dtype; it is the empty row whose zeros
# half precision could get wrong.
KINDS = {
    "fp32": ("none", "right", "holes", "empty_row", "left"),
    "fp16": ("right", "empty_row"),
    "bf16": ("holes", "empty_row", "left"),
}


@pytest.mark.parametrize(
    ("dtype", "kind"), [(dtype, kind) for dtype, kinds in KINDS.items() for kind in kinds]
)
@pytest.mark.parametrize(("family", "head"), zoo.CASES, ids=lambda case: case)
@pytest.mark.parametrize("backend", model_backends())
def test_parity(backend: str, family: str, head: str, dtype: str, kind: str) -> None:
    changes = zoo.sizes_for(backend, family, DTYPES[dtype])
    model = zoo.build(family, head, **changes).to(DTYPES[dtype])
    call = many_texts_for(family, head, kind)
    if kind == "left" and zoo.refuses_left_padding(family, head):
        with torch.inference_mode():
            expected = model(**call)[0]
            assert torch.equal(encoder_fast.patch(model, backend)(**call)[0], expected)
        assert "left padding" in next(iter(encoder_fast.report(model).fallbacks))
        return
    report = encoder_fast.check_parity(model, call, backend=backend)
    assert report.ok, str(report)


def test_no_head_is_missing() -> None:
    """The grid has every head that transformers has, but for those of decoders."""
    known = set(dir(transformers))
    for family, (_, _, prefix, heads) in zoo.FAMILIES.items():
        has = {name.removeprefix(prefix) for name in known if re.match(f"{prefix}For[A-Z]", name)}
        # test_parity_bert has it
        assert has - {"ForCausalLM", "ForNextSentencePrediction"} == set(heads) - {"Model"}, family


def modules_in(part: object) -> Iterator[nn.Module]:
    """The modules that a spec names."""
    if isinstance(part, nn.Module):
        yield part
    elif isinstance(part, tuple):
        yield from (module for one in part for module in modules_in(one))
    elif dataclasses.is_dataclass(part):
        for each in dataclasses.fields(part):
            yield from modules_in(getattr(part, each.name))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_module_of_a_spec_is_watched(family: str) -> None:
    """What is kept of them while nothing in the stack changes would else go on being used."""
    model = encoder_fast.patch(zoo.build(family), "reference", strict=True)
    with torch.inference_mode():
        model(**call_for(family, "Model", "none"))
    reading = model.__dict__["_encoder_fast"]._reading
    named = {id(module): module for module in modules_in(reading.spec)}
    watched = set(map(id, reading.stack.watch._objects))
    assert len(named) > 10
    assert [type(m).__name__ for key, m in named.items() if key not in watched] == []


SIZES = {
    "distilbert": {"dim": 768, "n_heads": 12, "hidden_dim": 3072},
    "electra": {"embedding_size": 128},
    "albert": {"embedding_size": 128, "num_hidden_groups": 1},
    "modernbert": {
        "num_hidden_layers": 2,
        "global_attn_every_n_layers": 2,
        "intermediate_size": 1152,
        **{f"{part}_bias": False for part in ("norm", "attention", "mlp")},
    },
}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


@pytest.mark.parametrize("family", [name for name in zoo.FAMILIES if name != "bert"])
@pytest.mark.parametrize("backend", model_backends())
def test_base_size(backend: str, family: str) -> None:
    dtype = torch.float16 if backend == "cuda" else torch.float32
    zoo.sizes_for(backend, family, dtype)  # its own will do, where the family does
    sizes = SIZES.get(family, {})
    model = zoo.build(family, **(sizes if "dim" in sizes else {**BASE, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)  # as these sizes are initialised
    call = call_for(family, "Model", "right")
    report = encoder_fast.check_parity(model.to(dtype), call, backend=backend)
    assert report.ok, str(report)


def labels_for(family: str, head: str, call: dict) -> dict:
    """The labels that a head takes, none of them on padding."""
    ids = call["input_ids"]
    texts = torch.arange(len(ids), device=DEVICE)
    classes = texts % 2
    mask = call.get("attention_mask", torch.ones_like(ids))
    if head == "ForMaskedLM":
        return {"labels": ids.masked_fill(mask == 0, -100)}
    if head == "ForTokenClassification":
        return {"labels": (ids % 2).masked_fill(mask == 0, -100)}
    if head == "ForQuestionAnswering":
        return {"start_positions": texts, "end_positions": texts + 2}
    if (family, head) == ("electra", "ForPreTraining"):
        return {"labels": ids % 2}
    if head == "ForPreTraining":
        order = "next_sentence_label" if family == "bert" else "sentence_order_label"
        return {"labels": ids.masked_fill(mask == 0, -100), order: classes}
    return {} if head == "Model" else {"labels": classes}


def tensors(output: Mapping) -> list[torch.Tensor]:
    return [value for value in output.values() if torch.is_tensor(value)]


@pytest.mark.parametrize(("family", "head"), zoo.CASES, ids=lambda case: case)
def test_behaviour(family: str, head: str, tmp_path: Path) -> None:
    """What transformers does around the numbers: losses, tuples, hidden states, copies, files."""
    model = zoo.build(family, head)
    # The loss over a text's positions counts those of padding.
    call = call_for(family, head, "none" if head == "ForQuestionAnswering" else "right")
    labelled = {**call, **labels_for(family, head, call), "output_hidden_states": True}
    with torch.inference_mode():
        before = model(**labelled)
        plain = model(**call, return_dict=False)
        encoder_fast.patch(model, strict=True)
        after = model(**labelled)
        as_tuple = model(**call, return_dict=False)
        cloned = copy.deepcopy(model)(**call, return_dict=False)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval().to(DEVICE)(**labelled)
        restored = encoder_fast.unpatch(model)(**labelled)
    assert list(after.keys()) == list(before.keys())
    assert [s.shape for s in after.hidden_states] == [s.shape for s in before.hidden_states]
    assert [x.shape for x in as_tuple] == [x.shape for x in plain]
    assert all(map(torch.equal, cloned, as_tuple))
    for same in (loaded, restored):
        assert all(map(torch.equal, tensors(same), tensors(before)))
    if head != "Model":
        # A single number may be exact by chance: what it is made of, test_parity compares.
        torch.testing.assert_close(after.loss, before.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f not in zoo.WITHOUT_LIMIT])
def test_too_long_names_the_limit(family: str) -> None:
    model = encoder_fast.patch(zoo.build(family))
    limit = 38 if family in zoo.ROBERTAS else 40
    ids = torch.full((1, limit + 1), 5, device=DEVICE)
    with torch.inference_mode(), pytest.raises(ValueError, match=f"limit of {limit} positions"):
        model(ids)
    with torch.inference_mode():
        model(ids[:, 1:])


@pytest.mark.parametrize("family", zoo.ROBERTAS)
def test_too_many_embeddings_name_the_limit(family: str) -> None:
    """Their positions count all columns, masked or not."""
    model = encoder_fast.patch(zoo.build(family))
    mask = torch.zeros(2, 39, dtype=torch.long, device=DEVICE)
    mask[:, -5:] = 1
    embeds = torch.randn(2, 39, 48, device=DEVICE)
    with torch.inference_mode(), pytest.raises(ValueError, match="limit of 38 positions"):
        model(inputs_embeds=embeds, attention_mask=mask)


def test_roberta_positions_skip_padding_of_any_length() -> None:
    """More columns than positions are fine as long as the real tokens fit."""
    model = zoo.build("roberta", "ForTokenClassification", max_position_embeddings=12)
    mask = torch.zeros(2, 12, dtype=torch.long, device=DEVICE)
    mask[0, 2:12], mask[1, 5:9] = 1, 1
    ids = torch.randint(3, zoo.VOCAB, (2, 12), device=DEVICE)
    ids[mask == 0] = zoo.PAD
    report = encoder_fast.check_parity(model, {"input_ids": ids, "attention_mask": mask})
    assert report.ok, str(report)


@pytest.mark.parametrize("masked", ["no mask", "all", "less than the ids"])
@pytest.mark.parametrize("family", zoo.ROBERTAS)
def test_positions_count_the_ids(family: str, masked: str) -> None:
    """Padding ids don't count, whatever a mask says; all others do."""
    model = zoo.build(family, max_position_embeddings=12)  # 10 positions
    ids = torch.randint(3, zoo.VOCAB, (2, 12), device=DEVICE)
    ids[0, 10:], ids[1, :3] = zoo.PAD, zoo.PAD
    call = {"input_ids": ids}
    if masked != "no mask":
        call["attention_mask"] = torch.ones_like(ids)
    if masked == "less than the ids":
        call["attention_mask"][0, 9:] = 0
    report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)
    patched = encoder_fast.patch(model, strict=True)
    ids[0, 10] = 5
    with torch.inference_mode(), pytest.raises(ValueError, match=r"length 11 .* 10 positions"):
        patched(**call)
    encoder_fast.unpatch(model)
    with torch.inference_mode(), pytest.raises((IndexError, RuntimeError)):
        model(**call)
    encoder_fast.patch(model, strict=True)
    with torch.inference_mode():
        assert model(input_ids=ids[:0]).last_hidden_state.shape == (0, 12, 48)


def test_mpnet_beyond_its_buckets() -> None:
    """From a distance of 128 on all is one bucket; and the table is read anew in every call."""
    model = zoo.build("mpnet", max_position_embeddings=330)
    mask = torch.zeros(2, 320, dtype=torch.long, device=DEVICE)
    mask[0], mask[1, :141] = 1, 1
    call = {"input_ids": torch.randint(3, zoo.VOCAB, mask.shape, device=DEVICE)}
    call["attention_mask"] = mask
    call["input_ids"][mask == 0] = zoo.PAD
    encoder_fast.patch(model)
    outputs = []
    for scale in (1, 30):
        with torch.no_grad():
            model.encoder.relative_attention_bias.weight.mul_(scale)
        report = encoder_fast.check_parity(model, call)
        assert report.ok, str(report)
        with torch.inference_mode():
            outputs.append(model(**call).last_hidden_state)
    assert not torch.equal(*outputs)


def test_mpnet_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(encoder_fast.UnsupportedModelError, match="relative_attention_num_buckets"):
        encoder_fast.patch(zoo.build("mpnet", relative_attention_num_buckets=20))
    model = zoo.build("mpnet")
    monkeypatch.setattr(model.encoder, "compute_position_bias", lambda x: 0)
    with pytest.raises(encoder_fast.UnsupportedModelError, match="compute_position_bias"):
        encoder_fast.patch(model)
    model = zoo.build("mpnet")
    model.encoder.relative_attention_bias = torch.nn.Embedding(32, 5)
    with pytest.raises(encoder_fast.UnsupportedModelError, match=r"3 attention heads.* for 5"):
        encoder_fast.patch(model)


def test_inputs_embeds_per_family() -> None:
    for family in zoo.FAMILIES:
        model = zoo.build(family)
        call = call_for(family, "Model", "right")
        ids = call.pop("input_ids")
        with torch.inference_mode():
            call["inputs_embeds"] = model.get_input_embeddings()(ids)
        report = encoder_fast.check_parity(model, call)
        assert report.ok, f"{family}\n{report}"


def test_albert_groups() -> None:
    with pytest.raises(encoder_fast.UnsupportedModelError, match="inner_group_num=2"):
        encoder_fast.patch(zoo.build("albert", inner_group_num=2))


def test_a_pooler_taken_away() -> None:
    model = encoder_fast.patch(zoo.build("bert"))
    with torch.inference_mode():
        assert model(**inputs()).pooler_output is not None
        model.pooler = None
        assert model(**inputs()).pooler_output is None
    assert encoder_fast.report(model).fast_calls == 2


def test_the_error_lists_every_family() -> None:
    with pytest.raises(encoder_fast.UnsupportedModelError) as error:
        encoder_fast.patch(torch.nn.Linear(1, 1))
    for *_, prefix, _ in zoo.FAMILIES.values():
        assert f"{prefix}Model" in str(error.value)
        assert hasattr(transformers, f"{prefix}Model")
