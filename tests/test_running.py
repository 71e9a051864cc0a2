"""A patched model in use: threads, memory, torch.compile, other backends end to end."""

import gc
import os
import subprocess
import sys
import threading
import types

import pytest
import torch
import zoo
from berts import DEVICE, inputs, tiny
from torch import Tensor, nn

import encoder_fast
from encoder_fast import fingerprints
from encoder_fast.backends import cpu, heap, why_not
from encoder_fast.packing import PackedBatch
from encoder_fast.parity import compare

BACKENDS = [n for n in ("reference", "triton") if why_not(n, torch.device(DEVICE)) is None]


@pytest.mark.parametrize("kind", ["right", "left", "holes", "empty_row", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_backends_end_to_end(backend: str, kind: str) -> None:
    """The whole model on Triton too: in its interpreter where there is no GPU."""
    model = tiny("BertForTokenClassification")
    report = encoder_fast.check_parity(model, inputs(kind), backend=backend)
    assert report.backend == backend
    assert report.ok, str(report)


@pytest.mark.skipif(DEVICE != "cpu", reason="GEMMs on a CPU")
def test_gemms_come_in_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new one costs oneDNN half a megabyte."""
    seen = set()

    def linear(x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.add(x.shape[0])
        return original(x, *rest)

    original = cpu.linear_prepared
    monkeypatch.setattr(cpu, "linear_prepared", linear)
    model = encoder_fast.patch(tiny(max_position_embeddings=200), strict=True)
    with torch.inference_mode():
        for length in range(1, 201):
            ids = torch.ones(1, length, dtype=torch.long)
            assert model(input_ids=ids)[0].shape[1] == length
    assert seen == {cpu.rows_to_compute(length) for length in range(1, 201)}
    assert len(seen) < 80


GROWTH = """
import random, sys
from contextlib import nullcontext
import torch
from transformers import BertConfig, BertModel
import encoder_fast
from encoder_fast.backends import cpu

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

torch.set_num_threads(1)
sizes = dict(hidden_size=256, num_attention_heads=4, intermediate_size=1024, vocab_size=99)
model = BertModel(BertConfig(num_hidden_layers=2, **sizes)).eval()
if sys.argv[1] == "among":
    cpu.first_of_a_size = nullcontext
encoder_fast.patch(model, strict=True)
draw, before = random.Random(1), resident()
for _ in range(20):
    lengths = torch.tensor([draw.randint(1, 256) for _ in range(draw.randint(1, 32))])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    with torch.inference_mode():
        model(input_ids=mask, attention_mask=mask)
print(resident() - before)
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="malloc's heap")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_new_shapes_leave_behind_pins_no_memory() -> None:
    """Half of what would stay if oneDNN's primitives lay among a layer's blocks."""
    if heap._set_threshold() is None:
        pytest.skip("another malloc, or one with settings of its own")
    malloc = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(malloc)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", GROWTH, which],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for which in ("among", "apart")
    ]
    outputs = [process.communicate()[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    among, apart = (int(output) for output in outputs)
    assert apart < 0.7 * among


FAULTS = """
import resource
import torch
from transformers import BertConfig, BertModel
import encoder_fast

torch.set_num_threads(1)
sizes = dict(hidden_size=256, num_attention_heads=4, intermediate_size=1024, vocab_size=99)
model = encoder_fast.patch(BertModel(BertConfig(num_hidden_layers=2, **sizes)).eval())
ids = torch.ones(8, 256, dtype=torch.long)

def faults_of_a_forward():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.inference_mode():
        model(input_ids=ids)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([faults_of_a_forward() for _ in range(6)][-1])
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="malloc's heap")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_forward_finds_its_memory_again() -> None:
    """Mapped anew, one block of the feed-forward alone would be 2,048 page faults."""
    if heap._set_threshold() is None:
        pytest.skip("another malloc, or one with settings of its own")
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], check=True, stdout=subprocess.PIPE, text=True
    )
    assert int(done.stdout) < 1000


@pytest.mark.skipif(DEVICE != "cpu", reason="oneDNN")
def test_poolers_get_rows_side_by_side() -> None:
    """A stride that differs with S is another primitive; also where there is one text."""
    model = encoder_fast.patch(tiny("BertModel"), strict=True)
    seen: list[tuple[int, ...]] = []
    dense = model.pooler.dense
    dense.register_forward_pre_hook(lambda module, args: seen.append(args[0].stride()))
    with torch.inference_mode():
        for batch, length in ((3, 9), (1, 9), (1, 5)):
            model(input_ids=torch.ones(batch, length, dtype=torch.long))
    assert seen == [(dense.in_features, 1)] * 3


@pytest.mark.parametrize("where", ["class", "module"])
def test_a_pooler_with_another_forward_is_left_to_the_original(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mean(self: nn.Module, hidden: Tensor) -> Tensor:
        return hidden.mean(1)

    model, call = tiny("BertModel"), inputs("none")
    encoder_fast.patch(model)
    with torch.inference_mode():
        model(**call)
        pooler = model.pooler
        if where == "class":
            monkeypatch.setattr(type(pooler), "forward", mean)
        else:
            pooler.forward = types.MethodType(mean, pooler)
        output = model(**call)
    assert torch.equal(output.pooler_output, output.last_hidden_state.mean(1))
    assert encoder_fast.report(model).fast_calls == 1


def test_hooks_of_a_pooler_see_every_column() -> None:
    model, call = tiny("BertModel"), inputs("none")
    seen: list[Tensor] = []
    model.pooler.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        model(**call)
        encoder_fast.patch(model, strict=True)
        model(**call)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-3, atol=1e-4)


def test_two_threads_get_right_answers() -> None:
    model = encoder_fast.patch(tiny())
    calls = [inputs("right", length=length) for length in (14, 17, 20, 33)]
    with torch.inference_mode():
        expected = [model(**call)[0] for call in calls]
    wrong = []

    def work(index: int) -> None:
        with torch.inference_mode():
            for step in range(50):
                which = (index + step) % len(calls)
                if not torch.equal(model(**calls[which])[0], expected[which]):
                    wrong.append((index, step))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert encoder_fast.report(model).fast_calls == 4 + 100


def test_weights_changed_while_another_thread_runs() -> None:
    """No crash in the middle, and the new weights after it."""
    model, call = encoder_fast.patch(tiny()), inputs()
    stop, failed = threading.Event(), []

    def work() -> None:
        try:
            with torch.inference_mode():
                while not stop.is_set():
                    model(**call)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    with torch.no_grad():
        for _ in range(20):
            model.encoder.layer[0].output.dense.weight.mul_(1.01)
    stop.set()
    thread.join()
    assert failed == []
    report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)


def resident_bytes() -> int:
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def live_objects() -> int:
    """How many tensors and packed batches Python holds."""
    gc.collect()
    kinds = (Tensor, PackedBatch)
    # by type: isinstance asks some objects for their __class__, and lazy ones then load
    return sum(issubclass(type(one), kinds) for one in gc.get_objects())


def test_memory_does_not_grow_over_a_thousand_calls() -> None:
    model = encoder_fast.patch(tiny(hidden_size=96, intermediate_size=600))
    calls = [inputs("right", length=length) for length in range(14, 34)]
    with torch.inference_mode():
        for step in range(200):
            model(**calls[step % 20])
        objects, before = live_objects(), resident_bytes()
        for step in range(1000):
            model(**calls[step % 20])
    # A leak that is small in bytes shows in numbers.
    assert live_objects() == objects
    # One leaked hidden state a call would be 1000 x 4 x 21 x 96 x 4 bytes = 32 MB.
    assert resident_bytes() - before < 8 << 20


def test_memory_does_not_grow_as_weights_change() -> None:
    model, call = encoder_fast.patch(tiny(hidden_size=192, intermediate_size=768)), inputs()
    weight = model.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        for _ in range(20):
            weight.mul_(1.001)
            model(**call)
        gc.collect()
        before = resident_bytes()
        for _ in range(100):
            weight.mul_(1.001)
            model(**call)
    gc.collect()
    # One leaked set of prepared weights a call would be 100 x 3.5 MB.
    assert resident_bytes() - before < 50 << 20


def test_a_dropped_model_is_freed() -> None:
    model = encoder_fast.patch(tiny())
    with torch.inference_mode():
        model(**inputs())
    alive = threading.Event()
    torch.nn.Module.__setattr__(model, "witness", _Witness(alive))
    del model
    gc.collect()
    assert alive.is_set()


class _Witness:
    def __init__(self, freed: threading.Event) -> None:
        self._freed = freed

    def __del__(self) -> None:
        self._freed.set()


def test_torch_compile_of_a_patched_model() -> None:
    model, call = encoder_fast.patch(tiny()), inputs()
    with torch.inference_mode():
        expected = model(**call)[0]
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(**call)[0], expected)
    assert encoder_fast.report(model).fast_calls == 2


def test_inputs_embeds_and_own_positions() -> None:
    model, call = tiny(), inputs("holes")
    ids = call.pop("input_ids")
    with torch.inference_mode():
        call["inputs_embeds"] = model.embeddings.word_embeddings(ids)
    call["position_ids"] = torch.randint(0, 40, (1, 21), device=DEVICE)
    report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("hidden_states", [True, False])
@pytest.mark.parametrize("pooler", [True, False])
def test_outputs_have_the_originals_form(
    pooler: bool, hidden_states: bool, return_dict: bool
) -> None:
    model = tiny()
    if not pooler:
        model.pooler = None
    call = {**inputs(), "output_hidden_states": hidden_states, "return_dict": return_dict}
    with torch.inference_mode():
        theirs = model(**call)
        ours = encoder_fast.patch(model)(**call)
    assert type(ours) is type(theirs)
    if return_dict:
        assert list(ours.keys()) == list(theirs.keys())
    assert len(ours) == len(theirs)
    assert [type(part) for part in ours] == [type(part) for part in theirs]
    assert encoder_fast.report(model).fast_calls == 1


def test_config_defaults_for_outputs() -> None:
    model = tiny(output_hidden_states=True)
    with torch.inference_mode():
        theirs = model(**inputs())
        ours = encoder_fast.patch(model)(**inputs())
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3


@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("asked", [None, 0, 1, -1, [0, -2], [7, -9], []])
def test_hidden_states_are_chosen_as_the_original_does(
    asked: object, config: bool, family: str
) -> None:
    """By index since late versions of transformers 5, all of them or none before, and in families
    whose forward takes the argument by name; there alone, None leaves it to the config."""
    model = zoo.build(family, output_hidden_states=config)
    call = {"input_ids": inputs("none")["input_ids"], "output_hidden_states": asked}
    with torch.inference_mode():
        theirs = model(**call).get("hidden_states")
        ours = encoder_fast.patch(model, strict=True)(**call).get("hidden_states")
        every = model(**{**call, "output_hidden_states": True}).hidden_states
    assert (ours is None) == (theirs is None)
    for mine, other, state in zip(ours or (), theirs or (), every if ours else (), strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, state)


def test_return_dict_none() -> None:
    model = tiny(return_dict=False)
    with torch.inference_mode():
        theirs = model(**inputs(), return_dict=None)
        ours = encoder_fast.patch(model)(**inputs(), return_dict=None)
    assert type(ours) is type(theirs)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(encoder_fast.UnsupportedModelError, match="no layers"):
        encoder_fast.patch(tiny(num_hidden_layers=0))


def test_loss_in_eval_mode() -> None:
    model, call = tiny("BertForSequenceClassification"), inputs()
    call["labels"] = torch.tensor([0, 1, 1, 0], device=DEVICE)
    with torch.inference_mode():
        theirs = model(**call)
        ours = encoder_fast.patch(model)(**call)
    assert compare("loss", ours.loss, theirs.loss, theirs.loss.double()).error < 1e-5
    assert encoder_fast.report(model).fast_calls == 1


def test_positional_arguments() -> None:
    model, call = tiny(), inputs()
    with torch.inference_mode():
        named = encoder_fast.patch(model)(**call)[0]
        placed = model(call["input_ids"], call["attention_mask"], call["token_type_ids"])[0]
    assert torch.equal(named, placed)


@pytest.mark.parametrize("family", ["bert", "deberta_v2", "modernbert"])
def test_another_default_device(family: str) -> None:
    """It decides where tensors are made that say nothing else; the model's are none of them."""
    model, call = zoo.build(family), {"input_ids": inputs("none")["input_ids"]}
    with torch.inference_mode():
        expected = encoder_fast.patch(model, strict=True)(**call)[0]
        encoder_fast.patch(model, strict=True)
        fingerprints._odd_numbers.cache_clear()
        with torch.device("meta"):
            assert torch.equal(model(**call)[0], expected)


def test_parity_report_tells_what_was_not_proved() -> None:
    model, call = tiny(), inputs()
    call["attention_mask"] = call["attention_mask"] * 0.5
    report = encoder_fast.check_parity(model, call)
    assert not report.ok
    assert "NOT PROVED" in str(report)
    with pytest.raises(encoder_fast.ParityError, match="values other than 0 and 1"):
        encoder_fast.check_parity(model, call, raise_on_failure=True)
    with pytest.raises(ValueError, match="eval mode"):
        encoder_fast.check_parity(model.train(), call)
    with pytest.raises(TypeError, match=r"arguments by name.*; got a list"):
        encoder_fast.check_parity(model.eval(), ["a text"])


def test_a_broken_kernel_breaks_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    from encoder_fast.backends import reference

    original = reference.attention

    def off_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object):
        return original(q, k, v.roll(1, dims=0), *rest)

    monkeypatch.setattr(reference, "attention", off_by_one)
    report = encoder_fast.check_parity(tiny(), inputs(), backend="reference")
    assert not report.ok
    assert "BROKEN" in str(report)


def test_info_tells_what_is_there_and_why_not() -> None:
    info = encoder_fast.info()
    assert info.backends["reference"] == "available"
    if DEVICE == "cpu":
        assert info.backends["cpu"] == "available"
    assert info.versions["torch"] in str(info)
    for name in info.backends:
        assert f"backend {name}" in str(info)
