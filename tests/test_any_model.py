"""Whatever the config, the mask and the dtype: the parity rule holds, and no output is NaN."""

import pytest
import torch
import zoo
from berts import DEVICE, DTYPES

import encoder_fast

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

BATCH, LENGTH = 4, 21

# What a mask may meet; every other call has to run fast.
REASONS = ("a mask with holes", "a pooler or head over a padded first column")

# Not those with one value a token or text: the rule needs vectors, or chance decides.
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh", "quick_gelu")


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    """``(BATCH, LENGTH)``, a kind for each row: full, empty, padded on one side or anywhere."""
    rows = []
    columns = torch.arange(LENGTH)
    for _ in range(BATCH):
        kind = draw(st.sampled_from(["full", "right", "left", "holes", "empty"]))
        count = draw(st.integers(1, LENGTH))
        if kind == "holes":
            bits = st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH)
            rows.append(torch.tensor(draw(bits)))
        else:
            first = LENGTH - count if kind == "left" else 0
            last = {"full": LENGTH, "empty": 0}.get(kind, first + count)
            rows.append((columns >= first) & (columns < last))
    return torch.stack(rows).to(draw(st.sampled_from([torch.int64, torch.int32, torch.float32])))


@st.composite
def configs(draw: st.DrawFn, family: str) -> dict:
    """Changes to the tiny config of a family, by the names that its config class knows."""
    activation = draw(st.sampled_from(ACTIVATIONS))
    layers = draw(st.integers(1, 3))
    eps = draw(st.sampled_from([1e-12, 1e-5, 0.1]))
    if family == "distilbert":
        return {"activation": activation, "n_layers": layers}
    if family == "modernbert":
        return {
            "hidden_activation": activation,
            "norm_eps": eps,
            "num_hidden_layers": layers,
            "global_attn_every_n_layers": draw(st.integers(1, 3)),
            "local_attention": draw(st.sampled_from([2, 8, 128])),
        }
    changes = {"hidden_act": activation, "layer_norm_eps": eps, "num_hidden_layers": layers}
    if family == "albert":
        changes["num_hidden_groups"] = draw(st.integers(1, layers))
    if family in zoo.DEBERTAS:
        kinds = [[], ["c2p"], ["p2c"], ["c2p", "p2c"]]
        changes["pos_att_type"] = draw(st.sampled_from(kinds))
        changes["position_biased_input"] = draw(st.booleans())
        changes["relative_attention"] = draw(st.booleans())
        changes["type_vocab_size"] = draw(st.integers(0, 2))
    if family == "deberta_v2":
        changes["share_att_key"] = draw(st.booleans())
        changes["position_buckets"] = draw(st.sampled_from([-1, 8]))
        changes["norm_rel_ebd"] = draw(st.sampled_from(["none", "layer_norm"]))
        changes["conv_kernel_size"] = draw(st.sampled_from([0, 3]))
    return changes


@pytest.mark.parametrize("family", zoo.FAMILIES)
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_model(family: str, data: st.DataObject) -> None:
    head = data.draw(st.sampled_from(HEADS), "head")
    dtype = DTYPES[data.draw(st.sampled_from(list(DTYPES)), "dtype")]
    config = data.draw(configs(family), "config")
    model = zoo.build(family, head, num_labels=24, **config).to(dtype)
    mask = data.draw(masks(), "mask").to(DEVICE)
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    call = {"input_ids": torch.randint(0, zoo.VOCAB, mask.shape, device=DEVICE)}
    call["attention_mask"] = mask
    report = encoder_fast.check_parity(model, call)
    assert all(row.ok for row in report.rows), str(report)
    assert all(reason.startswith(REASONS) for reason in report.fallbacks), str(report)
    with torch.inference_mode():
        outputs = encoder_fast.patch(model)(**call, return_dict=False)
    assert all(output.isfinite().all() for output in outputs)
