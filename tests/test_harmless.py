"""What libraries hand on or leave behind, and nobody reads, does not end the fast path."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from berts import DEVICE, inputs, tiny
from torch import nn

import encoder_fast
from encoder_fast.patching.arguments import _UNREAD

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
VALUES = {"num_items_in_batch": 3, "labels": torch.ones(4, dtype=torch.long)}


def call_for(head: str = "Model") -> dict:
    ids = torch.randint(5, zoo.VOCAB, (2, 9), device=DEVICE)
    if head == "ForMultipleChoice":
        ids = ids.view(2, 1, 9)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.skipif(not TRANSFORMERS_5, reason="4 has no **kwargs there")
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_arguments_that_nobody_reads(family: str) -> None:
    model, call = zoo.build(family), call_for()
    extra = {name: VALUES.get(name, torch.zeros(2, 9)) for name in _UNREAD}
    with torch.inference_mode():
        expected = model(**call)[0]
        assert torch.equal(model(**call, **extra)[0], expected)  # nor does the original
        encoder_fast.patch(model, strict=True)
        assert torch.equal(model(**call, **extra)[0], model(**call)[0])


@pytest.mark.parametrize(("family", "head"), zoo.CASES)
def test_heads_as_the_trainer_calls_them(family: str, head: str) -> None:
    model = encoder_fast.patch(zoo.build(family, head))
    parameters = inspect.signature(model.forward).parameters.values()
    extra = {}
    if TRANSFORMERS_5 and any(p.kind is p.VAR_KEYWORD for p in parameters):
        extra = {"num_items_in_batch": torch.tensor(3, device=DEVICE)}
    with torch.inference_mode():
        model(**call_for(head), **extra)
    report = encoder_fast.report(model)
    assert (report.fast_calls, report.fallbacks) == (1, {})


@pytest.mark.skipif(TRANSFORMERS_5, reason="5 has **kwargs there")
def test_a_forward_without_kwargs_refuses_them_itself() -> None:
    model = encoder_fast.patch(tiny())
    with torch.inference_mode(), pytest.raises(TypeError, match="num_items_in_batch"):
        model(**inputs(), num_items_in_batch=3)


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = encoder_fast.patch(tiny("BertForSequenceClassification"))
    rows = [{"input_ids": [5, 6, i + 7], "labels": i % 2} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        report_to=[],
        use_cpu=DEVICE == "cpu",
        disable_tqdm=True,
        num_train_epochs=1,
        eval_strategy="epoch",
        save_strategy="no",
        neftune_noise_alpha=5.0,
        gradient_checkpointing=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.evaluate()
    trainer.predict(rows)
    report = encoder_fast.report(model)
    assert (report.fast_calls, report.fallbacks) == (2, {})
    # NEFTune's hook and those of gradient checkpointing are there while it evaluates
    trainer.train()
    report = encoder_fast.report(model)
    assert report.fast_calls == 3
    assert report.fallbacks == {"training mode (call model.eval())": 1}


def checkpointing(model: nn.Module) -> None:
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.gradient_checkpointing_disable()


def still_checkpointing(model: nn.Module) -> None:
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()


def inputs_that_require_gradients(model: nn.Module) -> None:
    model.enable_input_require_grads()
    model.enable_input_require_grads()  # whose handles replace the first one's
    model.disable_input_require_grads()


def peft_checkpointing(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        target_modules=["query", "q_lin", "Wqkv", "q", "query_proj", "in_proj"]
    )
    still_checkpointing(model)
    peft.get_peft_model(model, settings).unload()


def neftune(model: nn.Module) -> None:
    embeddings = model.get_input_embeddings()
    hook = getattr(transformers.trainer_utils, "neftune_post_forward_hook", None)
    if hook is None:
        from transformers.integrations.neftune import neftune_post_forward_hook as hook
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(hook)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "leave",
    [
        checkpointing,
        still_checkpointing,
        inputs_that_require_gradients,
        neftune,
        peft_checkpointing,
    ],
)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_what_training_leaves_behind(family: str, leave: Callable[[nn.Module], None]) -> None:
    model, call = zoo.build(family), call_for()
    with torch.no_grad():
        expected = encoder_fast.patch(model, strict=True)(**call)[0]
    leave(model)
    model.eval()
    with torch.no_grad():
        output = model(**call)[0]
    assert torch.equal(output, expected)
    assert not output.requires_grad
    # also where it was there first
    with torch.inference_mode():
        assert torch.equal(encoder_fast.patch(model, strict=True)(**call)[0], expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradients_that_a_hook_asks_for_are_recorded() -> None:
    """Frozen weights need no gradients, yet with this hook a user gets one to the embeddings."""
    model, call = encoder_fast.patch(tiny().requires_grad_(False)), inputs()
    with torch.no_grad():
        model(**call)
    model.enable_input_require_grads()
    output = model(**call)[0]
    assert output.requires_grad
    output.sum().backward()
    with torch.no_grad():
        model(**call)
    report = encoder_fast.report(model)
    assert report.fast_calls == 2
    (reason,) = report.fallbacks
    assert reason.startswith("gradients are enabled, and a hook makes the embeddings require them")
    assert model(**call)[0].requires_grad  # seen in a call where nothing else has changed


def test_a_hook_of_the_users_own_of_that_name_is_seen() -> None:
    model, seen = encoder_fast.patch(tiny()), []

    def make_inputs_require_grads(module: nn.Module, args: object, output: torch.Tensor) -> None:
        seen.append(output.shape)

    model.get_input_embeddings().register_forward_hook(make_inputs_require_grads)
    with torch.inference_mode():
        model(**inputs())
    assert len(seen) == 1
    assert encoder_fast.report(model).fallbacks == {"a hook on Embedding inside the stack": 1}


def test_training_is_the_reason_that_is_told() -> None:
    model = encoder_fast.patch(tiny(attn_implementation="eager")).train()
    with torch.no_grad():
        model(**inputs(), output_attentions=True)
    model.eval()
    model(**inputs(), output_attentions=True)
    reasons = list(encoder_fast.report(model).fallbacks)
    assert reasons[0].startswith("training mode")
    assert reasons[1].startswith("gradients are enabled")
