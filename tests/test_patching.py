"""The same model: what patch touches, what it refuses, and how unpatch gives everything back."""

import copy
import io
import pickle
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
import transformers
from berts import DEVICE, DTYPES, HEADS, config, inputs, tiny
from torch import nn

import encoder_fast


def run(model: nn.Module, **extra: object) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs_once(), **extra)[0]


def inputs_once() -> dict:
    torch.manual_seed(7)
    return inputs("right")


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the noise of a tiny model: the sharp comparison is test_parity_bert's."""
    valid = inputs_once()["attention_mask"].bool()
    return bool((a - b)[valid].abs().max() < 1e-4)


def test_returns_the_same_object_and_runs_fast() -> None:
    model = tiny()
    assert encoder_fast.patch(model) is model
    run(model)
    report = encoder_fast.report(model)
    assert (report.fast_calls, report.fallbacks) == (1, {})
    assert report.encoders[0].backend == ("triton" if DEVICE == "cuda" else "cpu")
    assert "family bert" in str(report)


@pytest.mark.parametrize("head", HEADS)
def test_class_keys_and_signature_stay(head: str) -> None:
    import inspect

    model = tiny(head)
    keys, signature = list(model.state_dict()), inspect.signature(model.forward)
    names = [name for name, _ in model.named_modules()]
    encoder_fast.patch(model)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    assert inspect.signature(model.forward) == signature
    assert type(model).__name__ == head
    assert isinstance(model, getattr(transformers, head))
    encoder = model if head == "BertModel" else model.bert
    assert type(encoder).__name__ == "BertModel"
    assert encoder_fast.report(model).encoders[0].path == ("" if head == "BertModel" else "bert")


def test_unpatch_is_bit_equal() -> None:
    model = tiny()
    before, cls, attributes = run(model), type(model), dict(model.__dict__)
    encoder_fast.patch(model)
    run(model)
    assert encoder_fast.unpatch(model) is model
    assert type(model) is cls
    assert model.__dict__.keys() == attributes.keys()
    assert torch.equal(run(model), before)
    encoder_fast.unpatch(model)  # harmless
    assert str(encoder_fast.report(model)) == "not patched"


def test_another_model_of_the_class_is_untouched() -> None:
    one, other = tiny(), tiny()
    encoder_fast.patch(one)
    assert type(other) is transformers.BertModel
    assert transformers.BertModel.forward is type(other).forward


def test_patched_restores_what_was_there() -> None:
    model = tiny()
    with encoder_fast.patched(model) as same:
        assert same is model
        run(model)
        assert encoder_fast.report(model).fast_calls == 1
    assert type(model) is transformers.BertModel
    encoder_fast.patch(model, "reference")
    with pytest.raises(KeyError), encoder_fast.patched(model):
        raise KeyError
    assert encoder_fast.report(model).encoders[0].backend == "reference"


def test_patched_restores_a_part_that_was_replaced_meanwhile() -> None:
    model = tiny("BertForTokenClassification")
    first = model.bert
    with encoder_fast.patched(model):
        model.bert = tiny(seed=1)
    assert type(first) is transformers.BertModel
    assert encoder_fast.report(first).encoders == ()


def test_unpatch_leaves_a_class_put_on_top() -> None:
    model = encoder_fast.patch(tiny())
    on_top = type("OnTop", (type(model),), {})
    model.__class__ = on_top
    before = run(model)
    encoder_fast.unpatch(model)
    assert type(model) is on_top
    assert agree(run(model), before)
    assert encoder_fast.report(model).encoders == ()


def test_a_class_put_on_top_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder_fast.patch(tiny())
    on_top = type("OnTop", (type(model),), {"__module__": __name__})
    monkeypatch.setitem(globals(), "OnTop", on_top)
    model.__class__ = on_top
    assert type(encoder_fast.patch(model)) is on_top
    before = run(model)
    for patched in (True, False):
        clone, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert type(clone) is type(loaded) is on_top
        assert agree(run(clone), before) and agree(run(loaded), before)
        assert [e.fast_calls for e in encoder_fast.report(clone).encoders] == [1] * patched
        encoder_fast.unpatch(model)


def test_threads_that_patch_a_class_for_the_first_time() -> None:
    class Slow(transformers.BertModel):
        def __init_subclass__(cls) -> None:
            time.sleep(0.05)  # so that both threads are making the class

    models = [Slow(config()).eval() for _ in range(2)]
    threads = [threading.Thread(target=encoder_fast.patch, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert type(models[0]) is type(models[1]) is not Slow
    assert [type(encoder_fast.unpatch(model)) for model in models] == [Slow, Slow]


def test_patching_again_replaces_the_options() -> None:
    model = encoder_fast.patch(encoder_fast.patch(tiny()), "reference", strict=True)
    run(model)
    assert encoder_fast.report(model).encoders[0].backend == "reference"
    assert type(encoder_fast.unpatch(model)) is transformers.BertModel


def test_save_and_load(tmp_path: object) -> None:
    model = tiny("BertForSequenceClassification")
    plain = model.state_dict()
    encoder_fast.patch(model)
    run(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["BertForSequenceClassification"]
    for key, value in loaded.state_dict().items():
        assert torch.equal(value.to(DEVICE), plain[key])


def test_the_class_makes_models_that_are_not_patched(tmp_path: object) -> None:
    model = tiny("BertForSequenceClassification")
    original = type(model)
    encoder_fast.patch(model).save_pretrained(tmp_path)
    mine = type("Mine", (type(model),), {})
    for other in (type(model).from_pretrained(tmp_path), type(model)(model.config)):
        assert type(other) is original
        assert type(copy.deepcopy(other)) is original
        assert encoder_fast.patch(other) is other
    assert type(mine(model.config)) is mine


def test_a_pickle_of_the_class_is_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type(encoder_fast.patch(tiny()))
    on_top = type("OnTop", (cls,), {"__module__": __name__})
    monkeypatch.setitem(globals(), "OnTop", on_top)
    assert pickle.loads(pickle.dumps(cls)) is transformers.BertModel
    assert pickle.loads(pickle.dumps(cls.from_pretrained)) == transformers.BertModel.from_pretrained
    assert pickle.loads(pickle.dumps(on_top)) is on_top


def test_load_state_dict_after_patching() -> None:
    model, other = tiny(seed=0), tiny(seed=1)
    expected = run(other)
    encoder_fast.patch(model)
    assert not agree(run(model), expected)
    model.load_state_dict(other.state_dict())
    assert agree(run(model), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cast_after_patching(dtype: str) -> None:
    model = encoder_fast.patch(tiny())
    run(model)
    model.to(DTYPES[dtype])
    report = encoder_fast.check_parity(model, inputs())
    assert report.ok, str(report)


@pytest.mark.gpu
def test_moving_between_devices() -> None:
    model = encoder_fast.patch(tiny().cpu())
    call = {name: value.cpu() for name, value in inputs().items()}
    with torch.inference_mode():
        on_cpu = model(**call)[0]
        on_gpu = model.cuda()(**{n: v.cuda() for n, v in call.items()})[0].cpu()
        model.cpu()(**call)
    assert (on_cpu - on_gpu)[call["attention_mask"].bool()].abs().max() < 1e-4
    assert encoder_fast.report(model).fast_calls == 3


def test_deepcopy_is_patched_and_independent() -> None:
    model = encoder_fast.patch(tiny())
    before = run(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.encoder.layer[0].attention.self.query.weight.zero_()
    assert not agree(run(clone), before)
    assert torch.equal(run(model), before)
    assert encoder_fast.report(clone).fast_calls == 1
    assert type(encoder_fast.unpatch(clone)) is transformers.BertModel
    assert encoder_fast.report(model).fast_calls == 2


def test_a_compiled_model_copies_and_pickles() -> None:
    model = encoder_fast.patch(tiny())
    model.compile(backend="eager")
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert run(clone).abs().max() == 0
    assert agree(run(pickle.loads(pickle.dumps(model))), run(model))


def test_shallow_copy_gives_right_results() -> None:
    model = encoder_fast.patch(tiny())
    before = run(model)
    clone = copy.copy(model)
    clone._modules = dict(model._modules)
    clone._modules["encoder"] = tiny(seed=3).encoder
    assert not agree(run(clone), before)
    assert torch.equal(run(model), before)


def test_pickles_load_without_encoder_fast(tmp_path: object) -> None:
    model = encoder_fast.patch(tiny())
    before = run(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is transformers.BertModel
    assert encoder_fast.report(loaded).encoders == ()
    assert agree(run(loaded), before)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    (tmp_path / "model.pt").write_bytes(buffer.getvalue())
    program = f"""
        import sys
        sys.modules["encoder_fast"] = None  # importing it is an error
        import torch
        model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        print(type(model).__name__)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "BertModel"


def test_hooks_on_the_model_itself_run() -> None:
    model = encoder_fast.patch(tiny())
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    model.pooler.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    run(model)
    assert seen == [(4, 48), (4, 21, 48)]
    assert encoder_fast.report(model).fast_calls == 1


def test_any_module_that_holds_one() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = tiny(seed=0), tiny(seed=1)

        def forward(self, **call: torch.Tensor) -> torch.Tensor:
            return self.left(**call)[0] + self.right(**call)[0]

    model = Siamese().eval()
    with torch.inference_mode():
        before = model(**inputs_once())
        after = encoder_fast.patch(model)(**inputs_once())
    assert agree(before, after)
    assert [e.path for e in encoder_fast.report(model).encoders] == ["left", "right"]


class OwnForward(transformers.BertModel):
    """A user's subclass that adds arithmetic of its own."""

    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        return output


class OwnMask(transformers.BertModel):
    """A user's subclass that changes what the forward calls."""

    def get_extended_attention_mask(self, *args: object, **kwargs: object) -> object:
        return super().get_extended_attention_mask(*args, **kwargs) * 0


class OwnMethods(transformers.BertModel):
    """A user's subclass that leaves the forward alone."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.extra = 1

    def embed(self) -> None: ...


def test_subclasses() -> None:
    with pytest.raises(encoder_fast.UnsupportedModelError, match="BertModel"):
        encoder_fast.patch(OwnMask(config()))
    with pytest.raises(encoder_fast.UnsupportedModelError, match="BertModel"):
        encoder_fast.patch(OwnForward(config()))
    model = encoder_fast.patch(OwnMethods(config()).eval().to(DEVICE))
    run(model)
    assert encoder_fast.report(model).fast_calls == 1
    assert type(model).__name__ == "OwnMethods"


@pytest.mark.parametrize(
    "build",
    [
        lambda: transformers.GPT2Model(
            transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)
        ),
        lambda: transformers.T5EncoderModel(
            transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
        ),
        lambda: nn.Linear(2, 2),
    ],
)
def test_unsupported_models_name_the_supported_ones(build: object) -> None:
    model = build()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(encoder_fast.UnsupportedModelError, match=r"Supported: .*BertModel"):
        encoder_fast.patch(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_an_unsupported_part_leaves_everything_unpatched() -> None:
    class LowRank(nn.Linear):
        pass

    pair = nn.ModuleList([tiny(), tiny()])
    pair[1].encoder.layer[1].attention.self.key = LowRank(48, 48)
    with pytest.raises(encoder_fast.UnsupportedModelError, match="LowRank stands where Linear"):
        encoder_fast.patch(pair)
    assert all(type(model) is transformers.BertModel for model in pair)


def test_a_replaced_forward_is_refused() -> None:
    model = tiny()
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(encoder_fast.UnsupportedModelError, match="forward was replaced"):
        encoder_fast.patch(model)


def test_relative_positions_are_refused() -> None:
    model = tiny()
    model.config.position_embedding_type = "relative_key"
    with pytest.raises(encoder_fast.UnsupportedModelError, match="relative_key"):
        encoder_fast.patch(model)


def test_backend_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'auto' or one of .*'cpu'.*got 'gpu'"):
        encoder_fast.patch(tiny(), "gpu")
    other = "cpu" if DEVICE == "cuda" else "triton"
    model = tiny()
    if other == "triton":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(encoder_fast.BackendUnavailableError, match=f"backend '{other}'"):
        encoder_fast.patch(model, other)
    assert type(model) is transformers.BertModel


def test_head_sizes_the_kernels_lack_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = tiny(hidden_size=10, num_attention_heads=2)
    with pytest.raises(encoder_fast.UnsupportedModelError, match=r"head sizes .*got 5"):
        encoder_fast.patch(model, "triton")


def test_a_missing_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(encoder_fast.BackendUnavailableError, match="triton is not installed"):
        encoder_fast.patch(tiny(), "triton")


def test_not_a_model() -> None:
    with pytest.raises(
        TypeError, match=r"a loaded torch\.nn\.Module or .*, got 'bert-base-uncased'"
    ):
        encoder_fast.patch("bert-base-uncased")


def test_a_pipeline() -> None:
    class Pipeline:
        model = tiny()

    assert encoder_fast.patch(Pipeline) is Pipeline
    assert encoder_fast.report(Pipeline).encoders[0].model_class == "BertModel"
