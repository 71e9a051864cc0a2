"""What is ModernBERT's own: windows, rotary positions, gates, and where its norms stand."""

import copy
from collections.abc import Callable

import pytest
import torch
import zoo
from berts import DEVICE, inputs
from torch import Tensor, nn

import encoder_fast
from encoder_fast import engine

# transformers 4 gives every layer a rotary embedding of its own, 5 one to the model
SHARED = hasattr(zoo.build("modernbert"), "rotary_emb")


def long_call(length: int = 150, batch: int = 3) -> dict[str, Tensor]:
    lengths = torch.tensor([length, length // 2, 1], device=DEVICE).repeat(batch)[:batch]
    mask = (torch.arange(length, device=DEVICE) < lengths[:, None]).long()
    ids = torch.randint(3, zoo.VOCAB, (batch, length), device=DEVICE)
    return {"input_ids": ids.masked_fill(mask == 0, zoo.PAD), "attention_mask": mask}


def assert_parity(model: nn.Module, call: dict) -> None:
    report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)


# A token sees local_attention // 2 on either side; 2 sees its neighbours alone, and 1 only itself.
@pytest.mark.parametrize("local_attention", [1, 2, 9, 64, 128, 400])
def test_windows(local_attention: int) -> None:
    assert_parity(zoo.build("modernbert", local_attention=local_attention), long_call())


@pytest.mark.parametrize("every", [1, 2, 5])
def test_layers_that_see_everything(every: int) -> None:
    assert_parity(zoo.build("modernbert", global_attn_every_n_layers=every), long_call(60))


@pytest.mark.skipif(not SHARED, reason="transformers 4 has no layer_types")
def test_layer_types() -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert_parity(zoo.build("modernbert", layer_types=types), long_call(60))


def test_a_long_text() -> None:
    """As many tokens as the published models take, on both sides of the blocks of a window."""
    sizes = {"num_hidden_layers": 2, "global_attn_every_n_layers": 2}
    model = zoo.build("modernbert", **sizes, max_position_embeddings=8192, local_attention=128)
    ids = torch.randint(3, zoo.VOCAB, (1, 8192), device=DEVICE)
    with torch.inference_mode():
        before = model(ids).last_hidden_state
        after = encoder_fast.patch(model, strict=True)(ids).last_hidden_state
        # sdpa in both: an eager copy would keep 8192 x 8192 scores of every head in float64
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_positions_are_what_the_caller_says(seed: int) -> None:
    torch.manual_seed(seed)
    call = long_call(40)
    call["position_ids"] = torch.randint(0, 8192, (1 + 2 * (seed % 2), 40), device=DEVICE)
    assert_parity(zoo.build("modernbert"), call)


def test_thetas_differ() -> None:
    changes = (
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 50.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
            }
        }
        if SHARED
        else {"global_rope_theta": 50.0, "local_rope_theta": 7.0}
    )
    assert_parity(zoo.build("modernbert", **changes), long_call(60))


def test_angles_are_computed_once_for_each_theta(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder_fast.patch(zoo.build("modernbert", num_hidden_layers=7))
    calls = []
    original = engine.rotary.rotary_tables
    monkeypatch.setattr(
        engine.rotary, "rotary_tables", lambda *args: calls.append(1) or original(*args)
    )
    with torch.inference_mode():
        model(**long_call(60))
    assert len(calls) == 2


def test_frequencies_are_read_anew() -> None:
    model = encoder_fast.patch(zoo.build("modernbert"))
    call = long_call(60)
    with torch.inference_mode():
        model(**call)
        if SHARED:
            model.rotary_emb.full_attention_inv_freq.mul_(0.5)
        else:
            model.layers[3].attn.rotary_emb.inv_freq.mul_(0.5)
    assert_parity(model, call)


def test_another_rope_is_refused_by_name() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(encoder_fast.UnsupportedModelError, match="rope_type='linear'"):
        encoder_fast.patch(zoo.build("modernbert", rope_scaling=scaling))


@pytest.mark.parametrize("window", [40, 38, 4])
def test_holes_at_the_edge_of_the_window(window: int) -> None:
    """Of 21 columns, 20 see each other, all but two pairs do, and few do."""
    assert_parity(zoo.build("modernbert", local_attention=window), inputs_without_types("holes"))


def inputs_without_types(kind: str) -> dict[str, Tensor]:
    call = inputs(kind)
    del call["token_type_ids"]
    return call


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "gelu_pytorch_tanh"])
def test_gates(activation: str, biases: bool) -> None:
    changes = {f"{part}_bias": biases for part in ("norm", "attention", "mlp")}
    model = zoo.build("modernbert", hidden_activation=activation, **changes)
    assert_parity(model, long_call(30))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMultipleChoice"])
def test_classifier_pooling(head: str, pooling: str) -> None:
    model = zoo.build("modernbert", head, classifier_pooling=pooling)
    call = long_call(30, batch=16)  # logits enough that their error is no matter of luck
    if head == "ForMultipleChoice":
        call = {name: value[None] for name, value in call.items()}
    with torch.inference_mode():
        before = model(**call).logits
        # without hidden states asked for, where the last layer may leave tokens out
        after = encoder_fast.patch(model, strict=True)(**call).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert_parity(model, call)


@pytest.mark.parametrize("sparse", [False, True])
def test_masked_lm_loss(sparse: bool) -> None:
    model = zoo.build("modernbert", "ForMaskedLM", sparse_prediction=sparse)
    call = long_call(30)
    call["labels"] = torch.where(call["input_ids"] % 7 == 0, call["input_ids"], -100)
    call["labels"][call["attention_mask"] == 0] = -100
    assert (call["labels"] >= 0).any()
    with torch.inference_mode():
        before = model(**call)
        after = encoder_fast.patch(model, strict=True)(**call)
    assert after.logits.shape == before.logits.shape
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-4, atol=1e-5)


def test_the_last_hidden_state_stands_where_transformers_puts_it() -> None:
    model = zoo.build("modernbert")
    call = long_call(30)
    valid = call["attention_mask"].bool()
    with torch.inference_mode():
        before = model(**call, output_hidden_states=True)
        after = encoder_fast.patch(model, strict=True)(**call, output_hidden_states=True)
    is_normed = torch.equal(before.hidden_states[-1], before.last_hidden_state)
    assert is_normed == torch.equal(after.hidden_states[-1], after.last_hidden_state)
    for ours, theirs in zip(after.hidden_states, before.hidden_states, strict=True):
        torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-4, atol=1e-4)
        assert (ours[~valid] == 0).all()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double_and_back"])
def test_cast_after_patching(cast: str) -> None:
    """``.half()`` also rounds the buffers with the frequencies, and then they are what counts."""
    model = encoder_fast.patch(zoo.build("modernbert"))
    if cast == "double_and_back":
        model.double().float()
    else:
        getattr(model, cast)()
    assert_parity(model, long_call(60))


def test_a_copy_stands_by_itself() -> None:
    model = encoder_fast.patch(zoo.build("modernbert"), strict=True)
    call = long_call(30)
    with torch.inference_mode():
        before = model(**call).last_hidden_state
        clone = copy.deepcopy(model)
        with torch.no_grad():
            clone.layers[1].mlp.Wi.weight.mul_(1.5)
            clone.final_norm.weight.mul_(2)
        assert torch.equal(model(**call).last_hidden_state, before)
        assert not torch.allclose(clone(**call).last_hidden_state, before)
    assert_parity(clone, call)


def test_tuples() -> None:
    model = zoo.build("modernbert")
    call = {**long_call(30), "output_hidden_states": True, "return_dict": False}
    with torch.inference_mode():
        before = model(**call)
        after = encoder_fast.patch(model, strict=True)(**call)
    assert isinstance(after, tuple)
    assert [type(item) for item in after] == [type(item) for item in before]


def _scale(parameter: Tensor) -> None:
    parameter.data.mul_(1.5)


EDITS: dict[str, Callable[[nn.Module], None]] = {
    "Wqkv": lambda model: _scale(model.layers[1].attn.Wqkv.weight),
    "Wqkv_bias": lambda model: _scale(model.layers[1].attn.Wqkv.bias),
    "Wo": lambda model: _scale(model.layers[2].attn.Wo.weight),
    "Wi_features": lambda model: _scale(model.layers[0].mlp.Wi.weight[:72]),
    "Wi_gates": lambda model: _scale(model.layers[0].mlp.Wi.weight[72:]),
    "mlp_Wo": lambda model: _scale(model.layers[3].mlp.Wo.weight),
    "attn_norm": lambda model: _scale(model.layers[1].attn_norm.weight),
    "mlp_norm": lambda model: _scale(model.layers[0].mlp_norm.weight),
    "final_norm": lambda model: _scale(model.final_norm.weight),
    "embedding_norm": lambda model: _scale(model.embeddings.norm.weight),
    "words": lambda model: _scale(model.embeddings.tok_embeddings.weight),
    "new_Wqkv": lambda model: setattr(
        model.layers[2].attn, "Wqkv", copy.deepcopy(model.layers[0].attn.Wqkv)
    ),
    "new_norm": lambda model: setattr(model, "final_norm", nn.LayerNorm(48, device=DEVICE).eval()),
    "local_attention": lambda model: setattr(model.config, "local_attention", 20),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_take_effect(edit: str) -> None:
    model = encoder_fast.patch(zoo.build("modernbert"), strict=True)
    # more tokens than run between two looks at all bytes
    call = long_call(300)
    with torch.inference_mode():
        before = model(**call).last_hidden_state
        EDITS[edit](model)
        assert not torch.allclose(model(**call).last_hidden_state, before, atol=1e-3)
    assert_parity(model, call)


@pytest.mark.parametrize("name", ["final_norm", "layers.0.attn_norm", "layers.1.mlp.Wo"])
def test_a_hook_is_seen(name: str) -> None:
    model = encoder_fast.patch(zoo.build("modernbert"))
    seen = []
    model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        model(**long_call(30))
    assert seen
    assert "a hook on" in next(iter(encoder_fast.report(model).fallbacks))


def test_sizes_that_a_head_repeats() -> None:
    """Heads of transformers 4 pass the input's own shape on."""
    model = encoder_fast.patch(zoo.build("modernbert"))
    call = long_call(30)
    with torch.inference_mode():
        model(**call, batch_size=3, seq_len=30)
        assert encoder_fast.report(model).fast_calls == 1
        if not SHARED:
            with pytest.raises(Exception):  # noqa: B017
                model(**call, batch_size=3, seq_len=31)
            assert "seq_len" in next(iter(encoder_fast.report(model).fallbacks))


def test_a_mask_for_each_kind_of_layer_runs_the_original() -> None:
    if not SHARED:
        pytest.skip("transformers 4 takes one mask")
    model = encoder_fast.patch(zoo.build("modernbert"))
    ids = long_call(30)["input_ids"]
    with torch.inference_mode():
        model(ids, attention_mask={"full_attention": None, "sliding_attention": None})
    assert "attention_mask is a dict" in next(iter(encoder_fast.report(model).fallbacks))
