"""Weights changed after patching take effect at the next call, however they were changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from berts import DEVICE, inputs, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import encoder_fast
from encoder_fast import weights
from encoder_fast.backends import cpu_kernels
from encoder_fast.backends.onednn import has_onednn
from encoder_fast.fingerprints import RUN_BYTES, SAMPLE_RUNS, Samples, checksum_of_all

LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def no_grad_edit(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.mul_(1.5)


def data_edit(linear: nn.Linear) -> None:
    """Past autograd's version counter."""
    linear.weight.data.mul_(1.5)


def data_copy(linear: nn.Linear) -> None:
    linear.weight.data.copy_(torch.randn_like(linear.weight))


def permutation(linear: nn.Linear) -> None:
    """The sum of all bytes stays the same."""
    linear.weight.data.copy_(linear.weight.data.roll(1, dims=1).clone())


def numpy_edit(linear: nn.Linear) -> None:
    if DEVICE == "cuda":
        pytest.skip("NumPy sees CPU tensors alone")
    linear.weight.detach().numpy()[:] *= 1.5


def new_parameter(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach() * 1.5)


def new_data(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data * 1.5


def transposed_data(linear: nn.Linear) -> None:
    """The same memory and version, read the other way round."""
    if linear.weight.shape[0] != linear.weight.shape[1]:
        pytest.skip("only a square weight can be transposed")
    linear.weight.data = linear.weight.data.t()


def set_data(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.set_(linear.weight.detach() * 1.5)


def swapped(linear: nn.Linear) -> None:
    """Another tensor behind the same object."""
    torch.utils.swap_tensors(linear.weight, nn.Parameter(linear.weight.detach() * 1.5))


def same_memory(linear: nn.Linear) -> None:
    """A new parameter whose counter may stand where the old one's stood."""
    linear.weight = nn.Parameter(linear.weight.detach())
    linear.weight.data.mul_(1.5)


def bias_edit(linear: nn.Linear) -> None:
    linear.bias.data.add_(torch.randn_like(linear.bias))


def no_bias(linear: nn.Linear) -> None:
    linear.bias = None


EDITS = (
    no_grad_edit,
    data_edit,
    data_copy,
    permutation,
    numpy_edit,
    new_parameter,
    new_data,
    set_data,
    swapped,
    same_memory,
    transposed_data,
    bias_edit,
    no_bias,
)

# Seen by their bytes alone. Where nobody looks at those, what is derived is late.
BY_BYTES = (data_edit, data_copy, permutation, numpy_edit, bias_edit)


# "reference" keeps weights by the rule of the GPU's backends: one stacked linear, one that is not.
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    ("path", "backend"),
    [
        *((path, "auto") for path in LINEARS),
        ("attention.self.query", "reference"),
        ("output.dense", "reference"),
    ],
)
def test_edits_take_effect(path: str, backend: str, edit: Callable[[nn.Linear], None]) -> None:
    if backend == "reference" and path.endswith("query") and edit in BY_BYTES:
        pytest.skip("late: see below")
    model, call = encoder_fast.patch(tiny(), backend), inputs()
    with torch.no_grad():
        before = model(**call)[0]
        edit(model.encoder.layer[1].get_submodule(path))
        after = model(**call)[0]
    assert encoder_fast.report(model).fallbacks == {}
    # softmax does not see a constant added to every key's score, so a key's bias changes nothing
    if not (path.endswith("key") and edit in (bias_edit, no_bias)):
        assert (after - before).abs().max() > 1e-3
    report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)


@pytest.mark.parametrize("edit", BY_BYTES)
def test_unseen_edits_are_late_where_bytes_are_not_looked_at(
    edit: Callable[[nn.Linear], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, call = encoder_fast.patch(tiny(), "reference"), inputs()
    monkeypatch.setattr(weights, "REWRITE_TOKENS", int(1.5 * call["attention_mask"].sum()))
    with torch.no_grad():
        first = model(**call)[0]
        edit(model.encoder.layer[1].attention.self.query)
        assert torch.equal(model(**call)[0], first)
        assert not torch.equal(model(**call)[0], first)
        report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)


class _Copies(TorchDispatchMode):
    """How often stacks and tables were written again."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ == "_foreach_copy_"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("family", "name", "copies"),
    # the stack; what is more than a copy; both
    [("bert", "query.weight", 1), ("deberta", "q_bias", 1), ("deberta_v2", "query_proj.weight", 2)],
)
def test_nothing_is_written_again_unless_something_changed(
    family: str, name: str, copies: int
) -> None:
    model = encoder_fast.patch(zoo.build(family), "reference", strict=True)
    call = {name: inputs()[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode(), _Copies() as seen:
        for _ in range(3):
            model(**call)
        assert seen.count == 0
    with torch.no_grad():
        model.get_submodule("encoder.layer.0").attention.self.get_parameter(name).mul_(2)
    with torch.inference_mode(), _Copies() as seen:
        for _ in range(3):
            model(**call)
    assert seen.count == copies


def test_writing_again_moves_nothing() -> None:
    """Whoever reads the buffers by address, a CUDA graph, stays right."""
    model, call = encoder_fast.patch(tiny(), "reference"), inputs()
    cache = model.__dict__["_encoder_fast"]._reading.cache
    like = model.embeddings.word_embeddings.weight
    with torch.no_grad():
        model(**call)
        first = cache.current(like, 1)
        seen = cache.may_run_ahead(first, 1)
        assert seen is not None and cache.still_holds(seen)
        query = model.encoder.layer[1].attention.self.query
        query.weight.mul_(1.5)
        assert not cache.still_holds(seen)
        assert cache.current(like, 1) is first
        assert torch.equal(first.layers[1].qkv.weight[:48], query.weight)
        # what was launched before the edit is still wrong, also where another thread wrote anew
        assert not cache.still_holds(seen)
        now = cache.may_run_ahead(first, 1)
        assert now is not None and cache.still_holds(now)


@pytest.mark.parametrize(
    "path",
    ["embeddings.word_embeddings", "embeddings.LayerNorm", "encoder.layer.0.output.LayerNorm"],
)
def test_tables_and_norms_are_live(path: str) -> None:
    model, call = encoder_fast.patch(tiny()), inputs()
    with torch.no_grad():
        model(**call)
        model.get_submodule(path).weight.data.mul_(1.5)
    report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)


def one_element(weight: torch.Tensor) -> None:
    weight.data[5, 7] = 4.0


def one_row(weight: torch.Tensor) -> None:
    weight.data[5] = 3.0


def exchanged_rows(weight: torch.Tensor) -> None:
    """The sum of all bytes stays the same."""
    weight.data[[7, 8]] = weight.data[[8, 7]].clone()


def exchanged_columns(weight: torch.Tensor) -> None:
    weight.data[:, [7, 8]] = weight.data[:, [8, 7]].clone()


@pytest.mark.parametrize("edit", [one_element, one_row, exchanged_rows, exchanged_columns])
@pytest.mark.parametrize("path", LINEARS)
def test_a_part_changed_unseen_by_autograd(path: str, edit: Callable[[torch.Tensor], None]) -> None:
    """It takes effect at the latest once FULL_LOOK_TOKENS more tokens have run."""
    model, call = encoder_fast.patch(tiny(max_position_embeddings=600)), inputs()
    filler = torch.zeros(weights.FULL_LOOK_TOKENS // 32, 32, dtype=torch.long, device=DEVICE)
    with torch.no_grad():
        model(**call)
        edit(model.encoder.layer[1].get_submodule(path).weight)
        model(filler)
    report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)


def test_every_single_element_is_in_the_checksum() -> None:
    weight = torch.randn(37, 29)
    known = checksum_of_all([weight])
    for index in range(weight.numel()):
        before = weight.view(-1)[index].item()
        weight.view(-1)[index] = before + 1e-3
        assert checksum_of_all([weight]) != known
        weight.view(-1)[index] = before
    assert checksum_of_all([weight]) == known


@pytest.mark.parametrize("own", [True, False], ids=["kernels", "pytorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_see_each_of_their_elements(
    own: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own and not cpu_kernels.compares_bytes():
        pytest.skip(f"the CPU has no kernels here: {cpu_kernels.why_not()}")
    monkeypatch.setattr(cpu_kernels, "compares_bytes", lambda: own)
    tensors = [torch.randn(64, 48, dtype=dtype), torch.randn(96, dtype=dtype).t(), torch.ones(3)]
    tensors[2] = tensors[2].to(dtype)
    samples = Samples(tensors)
    assert samples.are_unchanged()
    seen = 0
    for tensor in tensors:
        flat = tensor.view(-1)
        for index in range(flat.numel()):
            before = flat[index].item()
            flat[index] = before + 0.5
            seen += not samples.are_unchanged()
            flat[index] = before
            assert samples.are_unchanged()
    run = RUN_BYTES // tensors[0].element_size()
    assert seen == SAMPLE_RUNS * run + min(96, SAMPLE_RUNS * run) + 3


def test_head_pruning_between_calls() -> None:
    """Layers may come to have fewer heads than the config says (transformers 4 prunes them)."""
    model, call = encoder_fast.patch(tiny()), inputs()
    with torch.no_grad():
        model(**call)
        attention = model.encoder.layer[0].attention
        inner = attention.self
        for linear in (inner.query, inner.key, inner.value):
            linear.weight = nn.Parameter(linear.weight[16:].clone())
            linear.bias = nn.Parameter(linear.bias[16:].clone())
            linear.out_features = 32
        out = attention.output.dense
        out.weight = nn.Parameter(out.weight[:, 16:].clone())
        inner.num_attention_heads, inner.all_head_size = 2, 32
    report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)


def test_inference_mode_and_back() -> None:
    """What was prepared under inference_mode serves outside it, and the other way round."""
    for first in (torch.inference_mode, torch.no_grad):
        model, call = encoder_fast.patch(tiny()), inputs()
        with first():
            expected = model(**call)[0].clone()
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert torch.equal(model(**call)[0], expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_model_made_under_inference_mode(backend: str) -> None:
    """Its parameters have no version counter."""
    with torch.inference_mode():
        model, call = encoder_fast.patch(tiny(), backend), inputs()
        before = model(**call)[0]
        model.encoder.layer[0].attention.self.query.weight.mul_(2)
        assert not torch.equal(model(**call)[0], before)
    assert encoder_fast.report(model).fallbacks == {}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_unchanged_weights_are_prepared_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = weights.linear.prepare
    monkeypatch.setattr(weights.linear, "prepare", lambda *args: made.append(1) or original(*args))
    model, call = encoder_fast.patch(tiny(), backend), inputs()
    with torch.no_grad():
        for _ in range(3):
            model(**call)
    assert len(made) == 2 * 2  # Q, K, V and the output projection, of two layers


class _Gemms(TorchDispatchMode):
    """What oneDNN was asked for, and the GELUs that were not left to it."""

    def __init__(self) -> None:
        super().__init__()
        self.epilogues: list[str] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_linear_pointwise":
            assert args[1 if func._overloadname == "default" else 2].is_mkldnn, "a plain weight"
            attributes = [arg for arg in args if isinstance(arg, str)]
            self.epilogues.append(" ".join(filter(None, attributes)))
        elif name in ("_reorder_linear_weight", "gelu"):
            self.others.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.skipif(DEVICE != "cpu", reason="oneDNN is the CPU's")
@pytest.mark.skipif(not has_onednn(torch.float32), reason="PyTorch has no oneDNN here")
@pytest.mark.parametrize(
    ("width", "feed_forward"),
    [(72, ["gelu none", "none"]), (600, ["gelu none", "none", "gelu none", "add"])],
    ids=["whole", "in-slices"],
)
def test_onednn_has_reordered_weights_and_the_gelu(width: int, feed_forward: list[str]) -> None:
    model, call = encoder_fast.patch(tiny(intermediate_size=width), "cpu", strict=True), inputs()
    with torch.inference_mode():
        with _Gemms() as first:
            model(**call)
        with _Gemms() as second:
            model(**call)
    # Q, K and V in one; the attention's output; the feed-forward
    layer = ["none", "none", *feed_forward]
    assert first.epilogues == second.epilogues == layer * 2
    assert first.others == ["_reorder_linear_weight"] * len(layer) * 2
    assert second.others == []


@pytest.mark.parametrize("family", ["deberta", "deberta_v2"])
def test_what_is_derived_from_weights_follows_them(family: str) -> None:
    """Tables of positions, v1's biases by head and v2's convolution, by the GPU's rule."""
    changes = {"conv_kernel_size": 3} if family == "deberta_v2" else {}
    model = encoder_fast.patch(zoo.build(family, **changes), "reference")
    call = {name: inputs()[name] for name in ("input_ids", "attention_mask")}
    names = ("rel_embeddings", "q_bias", "pos_proj", "pos_q_proj", "conv.conv", "key_proj")
    for part in names:
        touched = [p for name, p in model.named_parameters() if part in name]
        with torch.no_grad():
            model(**call)
            for parameter in touched:
                parameter.mul_(1.5)
        report = encoder_fast.check_parity(model, call)
        assert report.ok and not report.fallbacks, f"{part}\n{report}"


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tables_follow_the_epsilon_of_their_norm(backend: str) -> None:
    model = encoder_fast.patch(zoo.build("deberta_v2"), backend)
    call = {name: inputs()[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = model(**call)[0]
        model.encoder.LayerNorm.eps = 0.5
        assert not torch.equal(model(**call)[0], before)
    report = encoder_fast.check_parity(model, call)
    assert report.ok and not report.fallbacks, str(report)


@pytest.mark.gpu
def test_a_gpu_forward_waits_once() -> None:
    model, call = encoder_fast.patch(tiny().half()), inputs()
    without_mask = {"input_ids": call["input_ids"]}
    with torch.inference_mode():
        model(**call)
        model(**without_mask)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**without_mask)
            with pytest.raises(RuntimeError, match="synchroniz"):
                model(**call)  # the one wait, for the count of tokens
        finally:
            torch.cuda.set_sync_debug_mode("default")
