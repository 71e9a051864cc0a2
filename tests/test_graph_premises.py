"""CUDA graphs of models that change: what they take for granted is looked at in every call."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import frozen_recorder
import graph_calls
import pytest
import torch
import torch.nn.functional as F
import zoo
from graph_calls import LENGTHS, call_of, expect_parity, graphs_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import encoder_fast
from encoder_fast import weights
from encoder_fast.graphs import cache
from encoder_fast.patching import stack

backend = graph_calls.backend


def edit_in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.attention.self.query.weight.mul_(1.5)
    layer.output.dense.weight.data.mul_(1.5)


def new_parameter(layer: nn.Module) -> None:
    dense = layer.output.dense
    dense.weight = nn.Parameter(dense.weight.detach() * 1.5)


def new_data(layer: nn.Module) -> None:
    key = layer.attention.self.key
    key.weight.data = key.weight.data * 1.5


def transposed(layer: nn.Module) -> None:
    """The same memory, read the other way round."""
    value = layer.attention.self.value
    value.weight.data = value.weight.data.t()


def new_norm(layer: nn.Module) -> None:
    norm = layer.attention.output.LayerNorm
    norm.weight = nn.Parameter(norm.weight.detach() * 1.5)


def new_epsilon(layer: nn.Module) -> None:
    layer.output.LayerNorm.eps = 0.5


def new_scale(layer: nn.Module) -> None:
    attention = layer.attention.self
    if "scaling" not in vars(attention):
        pytest.skip("a transformers whose attention computes its scale")
    attention.scaling *= 4


@pytest.mark.parametrize(
    ("edit", "recorded"),
    [
        (edit_in_place, 1),
        (new_parameter, 2),
        (new_data, 2),
        (transposed, 2),
        (new_norm, 2),
        (new_epsilon, 2),
        (new_scale, 2),
    ],
)
def test_changed_models(edit: Callable[[nn.Module], None], recorded: int, backend: str) -> None:
    model = zoo.build("bert")
    plain = copy.deepcopy(model)
    encoder_fast.patch(model, backend, cuda_graphs=True, strict=True)
    call = call_of(model, LENGTHS[0])
    with torch.inference_mode():
        model(**call)
        before = model(**call)[0]
    for either in (model, plain):
        edit(either.encoder.layer[1])
    for _ in range(2):
        expect_parity(model, plain, call)
    with torch.inference_mode():
        assert (model(**call)[0] - before).abs().max() > 1e-3
    assert graphs_of(model)[0] == recorded


def test_a_larger_vocabulary(backend: str) -> None:
    """A graph of the smaller table must not even be launched with the new ids."""
    model = zoo.build("bert")
    encoder_fast.patch(model, backend, cuda_graphs=True, strict=True)
    call = call_of(model, LENGTHS[0])
    with torch.inference_mode():
        for _ in range(2):
            model(**call)
    word = model.embeddings.word_embeddings
    word.weight = nn.Parameter(torch.cat([word.weight.detach(), word.weight.detach() + 1]))
    plain = encoder_fast.unpatch(copy.deepcopy(model))
    call["input_ids"] = call["input_ids"] + zoo.VOCAB * call["attention_mask"]
    for _ in range(2):
        expect_parity(model, plain, call)
    assert graphs_of(model)[:2] == (2, 2)


def test_the_model_is_looked_at_while_the_gpu_is_at_work(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build("bert")
    encoder_fast.patch(model, backend, cuda_graphs=True, strict=True)
    call = call_of(model, LENGTHS[0])
    with torch.inference_mode():
        for _ in range(2):
            model(**call)
        steps: list[str] = []
        for home, name in (
            (cache.GraphCache, "_replay"),
            (stack.Stack, "is_unchanged"),
            (weights.WeightCache, "still_holds"),
        ):
            note(monkeypatch, home, name, steps)
        model(**call)
    assert steps == ["_replay", "is_unchanged", "still_holds"]


def note(patch: pytest.MonkeyPatch, home: type, name: str, steps: list[str]) -> None:
    """Add ``name`` to ``steps`` at each of its calls."""
    original = getattr(home, name)

    def method(*arguments: Any, **options: Any) -> Any:
        steps.append(name)
        return original(*arguments, **options)

    patch.setattr(home, name, method)


def add_hook(model: nn.Module) -> Callable[[], object]:
    return model.encoder.layer[1].output.register_forward_hook(lambda *_: None).remove


def replace_forward(model: nn.Module) -> Callable[[], object]:
    dense = model.encoder.layer[0].output.dense
    dense.forward = lambda x: F.linear(x, dense.weight)
    return lambda: delattr(dense, "forward")


def train_a_part(model: nn.Module) -> Callable[[], object]:
    model.encoder.layer[0].attention.train()
    return model.eval


@pytest.mark.parametrize("change", [add_hook, replace_forward, train_a_part])
def test_what_was_launched_for_another_model_is_dropped(
    change: Callable[[nn.Module], Callable[[], object]],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once: the next calls of a model that fell back launch nothing ahead."""
    model = zoo.build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain = copy.deepcopy(model)
    encoder_fast.patch(model, backend, cuda_graphs=True)
    call = call_of(model, LENGTHS[0])
    with torch.inference_mode():
        for _ in range(2):
            model(**call)
        undo = change(model)
        change(plain)
        launched: list[str] = []
        note(monkeypatch, cache.GraphCache, "_replay", launched)
        for _ in range(3):
            assert torch.equal(model(**call)[0], plain(**call)[0])
        assert len(launched) == 1
        undo()
        for _ in range(2):
            model(**call)
    assert graphs_of(model)[:2] == (1, 3)
    assert list(encoder_fast.report(model).fallbacks.values()) == [3]


def test_an_edit_that_another_thread_has_seen_first(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It derives anew what the graph has read already, and later looks find nothing changed."""
    model = zoo.build("bert")
    plain = copy.deepcopy(model)
    encoder_fast.patch(model, backend, cuda_graphs=True, strict=True)
    call = call_of(model, LENGTHS[0])
    with torch.inference_mode():
        for _ in range(2):
            model(**call)
    of_model = model.__dict__["_encoder_fast"]._reading.cache
    replay, edited = cache.GraphCache._replay, [plain]

    def replay_and_edit(*arguments: Any) -> torch.Tensor:
        result = replay(*arguments)
        if edited == [plain]:
            edited.append(model)
            for either in edited:
                edit_in_place(either.encoder.layer[1])
            of_model.current(model.embeddings.word_embeddings.weight, 1)
        return result

    monkeypatch.setattr(cache.GraphCache, "_replay", replay_and_edit)
    expect_parity(model, plain, call)


def test_other_embeddings_take_ids_that_the_old_ones_refuse(backend: str) -> None:
    model = zoo.build("bert")
    encoder_fast.patch(model, backend, cuda_graphs=True, strict=True)
    call = call_of(model, LENGTHS[0])
    with torch.inference_mode():
        for _ in range(2):
            model(**call)
        model.resize_token_embeddings(2 * zoo.VOCAB)
        plain = encoder_fast.unpatch(copy.deepcopy(model))
        call["input_ids"] = call["input_ids"] + zoo.VOCAB * call["attention_mask"]
    for _ in range(2):
        expect_parity(model, plain, call)
    with torch.inference_mode(), pytest.raises(IndexError):
        model(**{**call, "input_ids": call["input_ids"] + zoo.VOCAB})


def test_weights_that_nobody_counts_the_edits_of(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look would never confirm what was launched ahead, so nothing is."""
    with torch.inference_mode():
        model = zoo.build("bert")
    encoder_fast.patch(model, backend, cuda_graphs=True, strict=True)
    call = call_of(model, LENGTHS[0])
    steps: list[str] = []
    note(monkeypatch, cache.GraphCache, "_replay", steps)
    with torch.inference_mode():
        for _ in range(3):
            before = model(**call)[0]
        model.encoder.layer[0].attention.self.key.weight.mul_(2)
        assert (model(**call)[0] - before).abs().max() > 1e-3
    assert graphs_of(model)[:2] == (1, 3)
    assert len(steps) == 3


def test_weights_that_were_replaced_are_not_kept(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all batches are too large for graphs from then on."""
    model = zoo.build("bert")
    encoder_fast.patch(model, backend, cuda_graphs=True, strict=True)
    of_model = model.__dict__["_encoder_fast"]._reading.cache
    with torch.inference_mode():
        for _ in range(2):
            model(**call_of(model, LENGTHS[0]))
        old = weakref.ref(of_model._live.weights)
        new_data(model.encoder.layer[0])
        monkeypatch.setattr(cache, "fewest_tokens", lambda *_: 0)
        monkeypatch.setattr(cache, "most_tokens", lambda *_: 0)
        model(**call_of(model, LENGTHS[0]))
    assert old() is None


def test_replays_write_no_stacks(backend: str) -> None:
    model = zoo.build("deberta_v2")
    encoder_fast.patch(model, backend, cuda_graphs=True, strict=True)
    call = call_of(model, LENGTHS[0])
    with torch.inference_mode():
        for _ in range(2):
            model(**call)
        with NoCopies():
            model(**call)
    assert graphs_of(model)[:2] == (1, 2)


class NoCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_foreach_copy_", "baddbmm")
        return func(*args, **kwargs or {})


def test_rotary_buffers_outlive_their_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator is told of each stream that a graph reads them on."""
    recorder = frozen_recorder.install(monkeypatch)
    model = encoder_fast.patch(zoo.build("modernbert"), "reference", cuda_graphs=True)
    with torch.inference_mode():
        for _ in range(2):
            model(**call_of(model, LENGTHS[0]))
    buffers = {n: b for n, b in model.named_buffers() if n.endswith("inv_freq")}
    (reads,) = recorder.reads
    told = {name for name, buffer in buffers.items() if any(buffer is read for read in reads)}
    assert told and told == {name for name in buffers if "original" not in name}


def test_rotary_buffers_are_watched(backend: str) -> None:
    model = zoo.build("modernbert")
    encoder_fast.patch(model, backend, cuda_graphs=True)
    call = call_of(model, LENGTHS[0])
    with torch.inference_mode():
        model(**call)
        before = model(**call)[0]
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if name.endswith("inv_freq") and buffer is not None:
                    module._buffers[name] = buffer * 0.5
        plain = encoder_fast.unpatch(copy.deepcopy(model))
        for _ in range(2):
            expect_parity(model, plain, call)
        assert (model(**call)[0] - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "setting",
    [
        "fp32_precision",
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_accumulation",
        "deterministic",
    ],
)
def test_settings_are_watched(
    setting: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They decide which kernels PyTorch launches."""
    frozen_recorder.install(monkeypatch)
    model = encoder_fast.patch(zoo.build("bert"), "reference", cuda_graphs=True)
    call = call_of(model, LENGTHS[0])
    with torch.inference_mode():
        for _ in range(3):
            model(**call)
        assert graphs_of(model)[0] == 1
        if setting == "deterministic":
            monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        elif setting == "fp32_precision":
            monkeypatch.setattr("encoder_fast.graphs.premises.float32_precision", lambda: "tf32")
        else:
            matmul = torch.backends.cuda.matmul
            before = getattr(matmul, setting)
            request.addfinalizer(lambda: setattr(matmul, setting, before))
            setattr(matmul, setting, not before)
        for _ in range(3):
            model(**call)
    assert graphs_of(model)[0] == 2
