"""DeBERTa v1, v2 and v3: every way to put one together, and what is refused."""

from collections.abc import Callable

import pytest
import torch
import zoo
from berts import DEVICE, DTYPES, inputs
from kernel_backends import kernel_backends
from torch import nn

import encoder_fast
from encoder_fast import position_tables
from encoder_fast.packing import pack_lengths
from encoder_fast.patching.packed import encode_packed

BOTH, C2P, P2C = ["c2p", "p2c"], ["c2p"], ["p2c"]

V1 = {
    "c2p": {"pos_att_type": C2P},
    "p2c": {"pos_att_type": P2C},
    "no-terms": {"pos_att_type": []},
    "none": {"pos_att_type": None},
    # It counts what is listed, also what is not computed.
    "a-third-type": {"pos_att_type": ["c2p", "p2c", "p2p"]},
    "no-relative-attention": {"relative_attention": False},
    "limit-of-the-positions": {"max_relative_positions": -1},
    "absolute-positions": {"position_biased_input": True, "type_vocab_size": 2},
    "embedding-size": {"position_biased_input": True, "embedding_size": 24},
}
V2 = {
    "c2p": {"pos_att_type": C2P},
    "p2c": {"pos_att_type": P2C},
    "text": {"pos_att_type": "p2c|c2p"},
    "none": {"pos_att_type": None},
    "own-projections": {"share_att_key": False},
    "own-c2p": {"share_att_key": False, "pos_att_type": C2P},
    "own-p2c": {"share_att_key": False, "pos_att_type": P2C},
    "no-norm": {"norm_rel_ebd": "none"},
    "no-buckets": {"position_buckets": -1, "max_relative_positions": 7},
    "buckets-of-their-own-limit": {"position_buckets": 10, "max_relative_positions": 16},
    "no-relative-attention": {"relative_attention": False},
    "convolution": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "wide-convolution": {"conv_kernel_size": 5},
    "absolute-positions": {"position_biased_input": True, "type_vocab_size": 2},
    "embedding-size": {"position_biased_input": True, "embedding_size": 24, "conv_kernel_size": 3},
}
# `auto` runs on what it chooses; the CUDA sources over their emulation where there is no GPU.
CUDA = [name for name in kernel_backends() if name.startswith("cuda")]
BACKENDS = ["auto", *CUDA]

CASES = [("deberta", name, changes) for name, changes in V1.items()] + [
    ("deberta_v2", name, changes) for name, changes in V2.items()
]


def cases(*families: str) -> pytest.MarkDecorator:
    chosen = [pytest.param(f, c, id=f"{f}-{name}") for f, name, c in CASES if f in families]
    return pytest.mark.parametrize(("family", "changes"), chosen)


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@cases("deberta", "deberta_v2")
def test_parity(family: str, changes: dict, kind: str) -> None:
    model = zoo.build(family, "ForTokenClassification", **changes)
    report = encoder_fast.check_parity(model, inputs(kind))
    assert report.ok, str(report)


@pytest.mark.parametrize("kind", ["empty_row", "holes"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["convolution", "own-projections", "no-buckets"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_in_half_precision(backend: str, name: str, dtype: str, kind: str) -> None:
    changes = {**V2[name], **zoo.sizes_for(backend, "deberta_v2", DTYPES[dtype])}
    model = zoo.build("deberta_v2", "ForTokenClassification", **changes).to(DTYPES[dtype])
    report = encoder_fast.check_parity(model, inputs(kind), backend=backend)
    assert report.ok, str(report)


@pytest.mark.parametrize("backend", CUDA)
@cases("deberta", "deberta_v2")
def test_parity_in_cuda(backend: str, family: str, changes: dict) -> None:
    changes = {**changes, **zoo.sizes_for(backend, family, torch.float16)}
    model = zoo.build(family, "ForTokenClassification", **changes).half()
    report = encoder_fast.check_parity(model, inputs("right"), backend=backend)
    assert report.ok, str(report)


@pytest.mark.parametrize("family", zoo.DEBERTAS)
def test_the_head_that_fills_masks(family: str) -> None:
    # The legacy head is in the grid of all families. transformers 4 ties the wrong weights here.
    model = zoo.build(family, "ForMaskedLM", legacy=False, tie_word_embeddings=False)
    report = encoder_fast.check_parity(model, inputs("right"))
    assert report.ok, str(report)


@pytest.mark.parametrize("family", zoo.DEBERTAS)
def test_longer_than_its_positions(family: str) -> None:
    # Without absolute positions nothing ends at max_position_embeddings, here 40.
    model = zoo.build(family, "ForTokenClassification")
    report = encoder_fast.check_parity(model, inputs("right", length=70))
    assert report.ok, str(report)


def test_packed_alone_and_together() -> None:
    """A sequence's neighbours in the batch change nothing, at the convolution's edges either."""
    model = encoder_fast.patch(zoo.build("deberta_v2", conv_kernel_size=5))
    lengths = [3, 0, 1, 9]
    ids = torch.randint(0, zoo.VOCAB, (sum(lengths),), device=DEVICE)
    with torch.inference_mode():
        together = encode_packed(model, pack_lengths(lengths, device=DEVICE), ids)
        start = 0
        for length in lengths:
            alone = ids[start : start + length]
            one = encode_packed(model, pack_lengths([length], device=DEVICE), alone)
            torch.testing.assert_close(together[start : start + length], one, rtol=0, atol=2e-6)
            start += length


def _position_table(model: nn.Module) -> torch.Tensor:
    return model.encoder.rel_embeddings.weight


EDITS: dict[str, tuple[str, Callable[[nn.Module], torch.Tensor]]] = {
    "positions": ("deberta", _position_table),
    "v1-projection": ("deberta", lambda m: m.encoder.layer[1].attention.self.pos_proj.weight),
    "v1-bias": ("deberta", lambda m: m.encoder.layer[1].attention.self.v_bias),
    "v1-norm": ("deberta", lambda m: m.encoder.layer[0].output.LayerNorm.weight),
    "v2-positions": ("deberta_v2", _position_table),
    "v2-norm-of-positions": ("deberta_v2", lambda m: m.encoder.LayerNorm.weight),
    "v2-shared": ("deberta_v2", lambda m: m.encoder.layer[1].attention.self.key_proj.weight),
    "v2-convolution": ("deberta_v2", lambda m: m.encoder.conv.conv.weight),
}


@pytest.mark.parametrize("unseen", (False, True), ids=("in-place", "data"))
@pytest.mark.parametrize("edit", EDITS)
def test_weights_changed_later_take_effect(edit: str, unseen: bool) -> None:
    family, weight_of = EDITS[edit]
    changes = {"conv_kernel_size": 3} if edit == "v2-convolution" else {}
    model = encoder_fast.patch(zoo.build(family, **changes))
    call = inputs("right")
    with torch.inference_mode():
        before = model(**call)[0]
    with torch.no_grad():
        weight = weight_of(model)
        (weight.data if unseen else weight).mul_(1.5)
    report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)
    with torch.inference_mode():
        assert not torch.equal(model(**call)[0], before)


REFUSED = {
    "talking_head=True": ("deberta", {"talking_head": True}),
    "conv_groups=2": ("deberta_v2", {"conv_kernel_size": 3, "conv_groups": 2}),
    "not centred": ("deberta_v2", {"conv_kernel_size": 4}),
    "no logarithmic steps": ("deberta_v2", {"position_buckets": 40, "max_relative_positions": 20}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_by_name(reason: str) -> None:
    family, changes = REFUSED[reason]
    model = zoo.build(family, **changes)
    with pytest.raises(encoder_fast.UnsupportedModelError, match=reason):
        encoder_fast.patch(model)


@pytest.mark.parametrize("family", zoo.DEBERTAS)
def test_z_steps(family: str) -> None:
    model = zoo.build(family)
    model.z_steps = 2
    with pytest.raises(encoder_fast.UnsupportedModelError, match="z_steps=2"):
        encoder_fast.patch(model)
    model.z_steps = 0
    encoder_fast.patch(model, strict=True)
    model.z_steps = 3
    with torch.inference_mode(), pytest.raises(encoder_fast.FallbackError, match="z_steps=3"):
        model(**inputs())


def test_all_layers_projections_at_once() -> None:
    """What a GPU does in every forward, here on any device: one GEMM for all of them."""
    table = torch.randn(10, 48, device=DEVICE)
    linears = [nn.Linear(48, 32, bias=i != 1).to(DEVICE) for i in range(3)]
    with torch.no_grad():
        together = position_tables._project_all(table, linears)
        for projected, module in zip(together, linears, strict=True):
            torch.testing.assert_close(projected, module(table), rtol=1e-5, atol=1e-5)
