"""Copies: of a patched model, and of what is wrapped around one, is a copy of the whole thing."""

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import transformers
from berts import DEVICE, config, inputs, tiny
from torch import nn
from torch.optim.swa_utils import AveragedModel

import encoder_fast


class Scaled(nn.Module):
    """Hands on what it doesn't know, as PEFT's wrapper does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, **call: torch.Tensor) -> torch.Tensor:
        return self.inner(**call)[0] * 10


class Plain:
    """No module, and hands on everything."""

    def __init__(self, inner: nn.Module) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, **call: torch.Tensor) -> torch.Tensor:
        return self.inner(**call)[0] * 10


class HandingOnAlways(nn.Module):
    """Looks nowhere else, as Lightning Fabric's wrapper does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__["_modules"]["inner"]
        return inner if name == "inner" else getattr(inner, name)

    def forward(self, **call: torch.Tensor) -> torch.Tensor:
        return self.inner(**call)[0] * 10


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Scaled(tiny(seed=0)), tiny("BertForTokenClassification", seed=1)
        self.again = self.left.inner  # one encoder in two places

    def forward(self, **call: torch.Tensor) -> torch.Tensor:
        return self.left(**call) + self.right(**call)[0].sum(-1, keepdim=True)


def prompt_tuned() -> nn.Module:
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    return peft.get_peft_model(tiny("BertForSequenceClassification"), settings).to(DEVICE).eval()


WRAPPERS: dict[str, Callable[[], Any]] = {
    "own": lambda: Scaled(tiny()),
    "own-always": lambda: HandingOnAlways(tiny()),
    "no-module": lambda: Plain(tiny()),
    "compiled": lambda: torch.compile(tiny(), backend="eager"),
    "averaged": lambda: AveragedModel(Scaled(HandingOnAlways(tiny()))),
    "data-parallel": lambda: nn.DataParallel(tiny()),
    "peft": prompt_tuned,
    "siamese": Siamese,
}


def run(model: Any) -> torch.Tensor:
    torch.manual_seed(7)
    with torch.inference_mode():
        output = model(**inputs())
    return output if isinstance(output, torch.Tensor) else output[0]


def patched(name: str) -> tuple[Any, nn.Module]:
    wrapper = WRAPPERS[name]()
    module = wrapper.inner if isinstance(wrapper, Plain) else wrapper
    encoder_fast.patch(module.eval())
    return wrapper, module


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy], ids=["deep", "shallow"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_copy_of_a_wrapper(name: str, how: Callable[[Any], Any]) -> None:
    wrapper, module = patched(name)
    before = run(wrapper)
    clone = how(wrapper)
    assert type(clone) is type(wrapper)
    assert torch.equal(run(clone), before)
    inner = clone.inner if isinstance(wrapper, Plain) else clone
    assert [e.path for e in encoder_fast.report(inner).encoders] == [
        e.path for e in encoder_fast.report(module).encoders
    ]
    assert encoder_fast.report(inner).fallbacks == {}
    if how is copy.deepcopy:
        ran = encoder_fast.report(inner).fast_calls
        assert ran == encoder_fast.report(module).fast_calls > 0  # each its own
        with torch.no_grad():
            for parameter in inner.parameters():
                parameter.zero_()
        assert torch.equal(run(wrapper), before)
        encoder_fast.unpatch(inner)
        assert encoder_fast.report(module).encoders


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["own", "no-module", "peft", "siamese"])
def test_pickle_of_a_wrapper(name: str) -> None:
    wrapper, module = patched(name)
    for loaded in (
        pickle.loads(pickle.dumps(wrapper)),
        pickle.loads(ForkingPickler.dumps(wrapper)),  # what a spawned process gets
    ):
        assert type(loaded) is type(wrapper)
        inner = loaded.inner if isinstance(wrapper, Plain) else loaded
        assert encoder_fast.report(inner).encoders == ()
        encoder_fast.unpatch(module)
        assert torch.equal(run(loaded), run(wrapper))
        encoder_fast.patch(module)


def test_saved_and_loaded_wrapper() -> None:
    wrapper, _ = patched("own")
    buffer = io.BytesIO()
    torch.save(wrapper, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is Scaled
    assert type(loaded.inner) is transformers.BertModel
    assert encoder_fast.report(loaded).encoders == ()


@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning", "ignore::DeprecationWarning")
def test_quantised_copy_of_a_wrapper() -> None:
    """``quantize_dynamic`` copies first; what it makes runs the original, counted."""
    wrapper, _ = patched("own")
    quantised = torch.ao.quantization.quantize_dynamic(wrapper.cpu(), {nn.Linear})
    assert type(quantised) is Scaled
    call = {name: value.cpu() for name, value in inputs().items()}
    with torch.inference_mode():
        output = quantised(**call)
        assert torch.equal(output, encoder_fast.unpatch(quantised)(**call))


def test_accelerate_prepares_and_copies() -> None:
    accelerate = pytest.importorskip("accelerate")
    wrapper = accelerate.Accelerator(cpu=DEVICE == "cpu").prepare(Scaled(tiny()))
    encoder_fast.patch(wrapper)
    clone = copy.deepcopy(wrapper)
    assert type(clone) is type(wrapper)
    assert torch.equal(run(clone), run(wrapper))


def test_shallow_copy_has_a_state_of_its_own() -> None:
    model = encoder_fast.patch(tiny(), "reference", strict=True)
    run(model)
    clone = copy.copy(model)
    run(clone)
    run(clone)
    assert encoder_fast.report(model).fast_calls == 1
    assert encoder_fast.report(clone).fast_calls == 2
    assert encoder_fast.report(clone).encoders[0].backend == "reference"
    with pytest.raises(encoder_fast.FallbackError), torch.inference_mode():
        clone(**inputs(), output_attentions=True)
    # the copy is patched by itself: to undo one leaves the other
    assert type(encoder_fast.unpatch(clone)) is transformers.BertModel
    assert encoder_fast.report(model).encoders


class CopiesItself(transformers.BertModel):
    """A user's subclass with a way of its own to copy."""

    def __deepcopy__(self, memo: dict) -> "CopiesItself":
        clone = type(self)(self.config)
        clone.load_state_dict(self.state_dict())
        return clone.eval()


def test_a_way_of_copying_that_the_class_has_is_used() -> None:
    model = encoder_fast.patch(CopiesItself(config()).eval().to(DEVICE))
    clone = copy.deepcopy(model)
    assert type(clone) is CopiesItself
    assert encoder_fast.report(clone).encoders == ()
