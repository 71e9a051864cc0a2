"""Padding in the first column that a pooler or head reads: fast, and the original's numbers."""

import copy
from typing import Any

import pytest
import torch
import zoo
from berts import DEVICE, DTYPES, inputs, tiny
from test_families import call_for, many_texts_for
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import encoder_fast
from encoder_fast import engine
from encoder_fast.backends import why_not
from encoder_fast.ops._library import Operator
from encoder_fast.parity import compare

PLAIN = [family for family in zoo.FAMILIES if family not in zoo.BY_DISTANCE]
HEADS = (
    "Model",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForTokenClassification",
    "ForPreTraining",
)
CASES = [case for case in zoo.CASES if case[0] in PLAIN and case[1] in HEADS]
BACKENDS = [n for n in ("reference", "triton") if why_not(n, torch.device(DEVICE)) is None]


def poolerless(family: str) -> nn.Module:
    model = zoo.build(family)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("family", "head"), CASES, ids=lambda case: case)
def test_rows_of_every_kind_beside_each_other(family: str, head: str, dtype: str) -> None:
    """Also what is pooled, each hidden state and the logits; padding alone in column 0 is in
    test_families."""
    model = zoo.build(family, head).to(DTYPES[dtype])
    report = encoder_fast.check_parity(model, many_texts_for(family, head, "mixed"))
    assert report.ok, str(report)


@pytest.mark.parametrize("family", PLAIN)
def test_random_masks(family: str) -> None:
    torch.manual_seed(1)
    model = encoder_fast.patch(zoo.build(family, "ForSequenceClassification"), strict=True)
    for density in (0.1, 0.5, 0.9):
        call = many_texts_for(family, "ForSequenceClassification", "right")
        shape = call["attention_mask"].shape
        call["attention_mask"] = (torch.rand(shape, device=DEVICE) < density).long()
        report = encoder_fast.check_parity(model, call)
        assert report.ok, str(report)


def test_rotary_positions_and_a_window_wider_than_the_rows() -> None:
    model = zoo.build("modernbert", "ForSequenceClassification", local_attention=40)
    for kind in ("left", "mixed"):
        call = many_texts_for("modernbert", "ForSequenceClassification", kind)
        report = encoder_fast.check_parity(model, call)
        assert report.ok, str(report)


@pytest.mark.parametrize("family", zoo.DEBERTAS)
def test_disentangled_attention_hides_the_text_from_padding(family: str) -> None:
    """Even where it has no relative positions: the original forward runs."""
    changes = {"relative_attention": False, "position_biased_input": True}
    model = zoo.build(family, "ForSequenceClassification", **changes)
    call = call_for(family, "ForSequenceClassification", "left")
    with torch.inference_mode():
        expected = model(**call).logits
        assert torch.equal(encoder_fast.patch(model)(**call).logits, expected)
    assert "not plain softmax" in next(iter(encoder_fast.report(model).fallbacks))


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_backends(backend: str) -> None:
    report = encoder_fast.check_parity(tiny(), inputs("mixed"), backend=backend)
    assert report.backend == backend
    assert report.ok, str(report)


def padded_states(model: nn.Module, call: dict) -> list[Tensor]:
    """What a patched model returns at the padded positions of each hidden state."""
    encoder_fast.patch(model, strict=True)
    with torch.inference_mode():
        output = model(**call, output_hidden_states=True)
    padding = call["attention_mask"] == 0
    return [x[padding] for x in (output.last_hidden_state, *output.hidden_states)]


@pytest.mark.parametrize("family", PLAIN)
def test_padding_of_a_bare_encoder_is_zero(family: str) -> None:
    model = zoo.build(family)
    for _ in range(2):  # patched once, and once more over that
        states = padded_states(model, call_for(family, "Model", "mixed"))
        assert len(states) >= 3
        assert not any(state.any() for state in states)


@pytest.mark.parametrize("family", [f for f in zoo.BY_DISTANCE if f != "mpnet"])
def test_left_padding_of_an_encoder_without_pooler(family: str) -> None:
    """All distances are the same as without it, and nobody reads the first column."""
    model, call = zoo.build(family), call_for(family, "Model", "left")
    report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)
    assert not any(state.any() for state in padded_states(model, call))


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_nothing_is_computed_that_nobody_reads(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    original = engine.linear.run_feed_forward

    def spy(x: Tensor, *rest: object) -> Tensor:
        rows.append(x.shape[0])
        return original(x, *rest)

    monkeypatch.setattr(engine.linear, "run_feed_forward", spy)
    call = call_for(family, "Model", "mixed")
    padded_states(poolerless(family), call)
    padded_states(zoo.build(family, "ForTokenClassification").base_model, call)
    tokens = int(call["attention_mask"].sum())
    assert set(rows) == {tokens}
    rows.clear()
    if family != "electra":
        padded_states(zoo.build(family), call)
        assert set(rows) == {tokens + 2}


def test_no_token_sees_an_onlooker_and_no_row_another() -> None:
    """A NaN in one place shows where that place is seen, and nowhere else."""
    model, call = encoder_fast.patch(tiny(), strict=True), inputs("mixed")
    nan, other = 3, 4
    call["input_ids"].fill_(other)
    with torch.inference_mode():
        model.embeddings.word_embeddings.weight[nan] = float("nan")
        call["input_ids"][1, 0] = nan  # the onlooker of row 1
        output = model(**call)
        assert output.last_hidden_state.isfinite().all()
        assert output.pooler_output.isnan().any(dim=1).tolist() == [False, True, False, False]
        call["input_ids"][1, 0] = other
        call["input_ids"][3, 10] = nan  # a token of another row, packed behind those of row 1
        output = model(**call)
    assert output.pooler_output.isnan().any(dim=1).tolist() == [False, False, False, True]
    assert output.last_hidden_state[:3].isfinite().all()


class OwnHead(nn.Module):
    """A user's head over the first column of several layers."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **call: Tensor) -> Tensor:
        output = self.encoder(**call, output_hidden_states=True)
        states = (output.last_hidden_state, *output.hidden_states)
        return torch.stack([state[:, 0] for state in states], dim=1)


def test_a_head_of_the_users_own_reads_the_originals_first_column() -> None:
    """It may take padding there for the text, so the whole batch is the original's."""
    model, call = OwnHead(zoo.build("roberta")).eval(), call_for("roberta", "Model", "mixed")
    with torch.inference_mode():
        original = model(**call)
        assert torch.equal(encoder_fast.patch(model)(**call), original)
        assert "left padding), which OwnHead may read" in next(
            iter(encoder_fast.report(model).fallbacks)
        )
        model(**call_for("roberta", "Model", "right"))
    assert encoder_fast.report(model).fast_calls == 1


@pytest.mark.parametrize("family", PLAIN)
def test_hidden_states_of_a_head_show_zeros_in_all_padding(family: str) -> None:
    """Also where the head reads the original's state in a first column that is padding."""
    head = "ForSequenceClassification"
    model, call = zoo.build(family, head), call_for(family, head, "mixed")
    padding = call["attention_mask"] == 0
    with torch.inference_mode():
        original = model(**call).logits
        output = encoder_fast.patch(model, strict=True)(**call, output_hidden_states=True)
    assert not any(state[padding].any() for state in output.hidden_states)
    with_text = ~padding.all(dim=1)
    torch.testing.assert_close(output.logits[with_text], original[with_text], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_a_hook_under_a_head_sees_one_kind_of_padding(family: str) -> None:
    """It is told the original's values in every row, or zeros in every row."""
    head = "ForSequenceClassification"
    model, seen = encoder_fast.patch(zoo.build(family, head)), []
    model.base_model.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    for kind in ("mixed", "right"):
        call = call_for(family, head, kind)
        with torch.inference_mode():
            model(**call)
        seen[-1] = seen[-1][call["attention_mask"] == 0]
    assert seen[0].any(dim=1).all()
    assert not seen[1].any()
    report = encoder_fast.report(model)
    assert report.fast_calls == 1
    assert f"which {type(model).__name__} may read" in next(iter(report.fallbacks))


def test_a_hook_on_the_pooler_sees_what_it_reads() -> None:
    """And what it keeps is not changed afterwards."""
    model, call, kept = encoder_fast.patch(tiny(), strict=True), inputs("mixed"), []
    model.pooler.register_forward_hook(lambda _, args, output: kept.append(args[0]))
    with torch.inference_mode():
        output = model(**call)
        pooled = model.pooler(kept[0])
    assert kept[0][1, 0].any()
    assert not output.last_hidden_state[1, 0].any()
    assert torch.equal(pooled, output.pooler_output)


def test_inputs_embeds_and_own_positions() -> None:
    for family in PLAIN:
        model, call = zoo.build(family), call_for(family, "Model", "mixed")
        with torch.inference_mode():
            call["inputs_embeds"] = model.get_input_embeddings()(call.pop("input_ids"))
        if family != "distilbert":
            call["position_ids"] = torch.randint(0, 40, (4, 21), device=DEVICE)
        report = encoder_fast.check_parity(model, call)
        assert report.ok, f"{family}\n{report}"


def test_the_host_waits_no_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "numpy"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: object, _name: str = name, _run: object = original):
            waits.append(_name)
            return _run(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    model = encoder_fast.patch(tiny(), strict=True)
    counts = []
    with torch.inference_mode():
        for kind in ("right", "right", "left", "mixed"):
            call = inputs(kind)
            waits.clear()
            model(**call)
            counts.append(len(waits))
    # the first call also prepares the weights
    assert counts[1] == counts[2] == counts[3]


_LOOKS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")


class _Waits(TorchDispatchMode):
    """Where a forward looks at a tensor's values, but for the looks of the backend's own ops."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._inside_an_op = False
        run_op = Operator.run

        def run(op: Operator, *arguments: object) -> object:
            self._inside_an_op = True
            try:
                return run_op(op, *arguments)
            finally:
                self._inside_an_op = False

        monkeypatch.setattr(Operator, "run", run)
        # These read a tensor of the CPU where it lies, and nothing is dispatched.
        for name in ("tolist", "numpy"):
            original = getattr(Tensor, name)

            def looked(x: Tensor, *args: object, _name: str = name, _run: Any = original) -> object:
                self._look(_name)
                return _run(x, *args)

            monkeypatch.setattr(Tensor, name, looked)

    def _look(self, name: str) -> None:
        if not self._inside_an_op:
            self.seen.append(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # how many a mask picks is asked for too
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in _LOOKS or by_mask:
            self._look(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("head", ["BertModel", "BertForSequenceClassification"])
@pytest.mark.parametrize(
    ("kind", "waits"), [("right", 1), ("left", 1), ("mixed", 1), ("empty_row", 1), ("none", 0)]
)
def test_a_whole_forward_waits_for_the_lengths_alone(
    kind: str, waits: int, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each look at a tensor is a wait; the backend here has the GPU's rules elsewhere."""
    model = encoder_fast.patch(tiny(head).cpu(), "reference", strict=True)
    call = {name: value.cpu() for name, value in inputs(kind).items()}
    for _ in range(2):  # the first prepares the weights
        with monkeypatch.context() as patches, torch.inference_mode(), _Waits(patches) as looks:
            model(**call)
        assert len(looks.seen) == waits, looks.seen


def check_logits(model: nn.Module, call: dict, logits: Tensor, original: Tensor) -> None:
    with torch.inference_mode():
        exact = copy.deepcopy(encoder_fast.unpatch(model)).double()(**call).logits
    row = compare("logits", logits, original, exact)
    assert row.ok, row


def test_an_encoder_patched_again_inside_its_head() -> None:
    """The head still reads the first column, and still says so."""
    family, head = "distilbert", "ForSequenceClassification"
    model, call = zoo.build(family, head), call_for(family, head, "left")
    with torch.inference_mode():
        original = model(**call).logits
        encoder_fast.patch(model)
        encoder_fast.patch(model.distilbert, strict=True)
        logits = model(**call).logits
    check_logits(model, call, logits, original)


class TwoHeads(nn.Module):
    """One encoder under a tagger, which is found first, and under a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.tagger = zoo.build("roberta", "ForTokenClassification")
        self.classifier = zoo.build("roberta", "ForSequenceClassification")
        self.classifier.roberta = self.tagger.roberta


def test_an_encoder_under_two_heads() -> None:
    both, call = TwoHeads(), call_for("roberta", "ForSequenceClassification", "left")
    with torch.inference_mode():
        original = both.classifier(**call).logits
        encoder_fast.patch(both, strict=True)
        logits = both.classifier(**call).logits
    check_logits(both.classifier, call, logits, original)


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_flash_attention_gives_padding_nothing_to_see(head: str) -> None:
    """What it would pool is none of the numbers that are computed here."""
    model = encoder_fast.patch(zoo.build("bert", head), strict=True)
    model.config._attn_implementation = "flash_attention_2"
    with torch.inference_mode():
        model(**inputs("right"))
        with pytest.raises(encoder_fast.FallbackError, match="flash attention"):
            model(**inputs("left"))
