"""Heads that read one token of each text: the last layer computes no more, and nobody notices."""

import copy
import pickle

import pytest
import torch
import zoo
from berts import DEVICE, inputs
from test_families import call_for
from torch import nn

import encoder_fast
from encoder_fast import engine
from encoder_fast.families import find_family
from encoder_fast.packing import pack_lengths
from encoder_fast.patching.packed import encode_packed


def _is_first_token_head(family: str, head: str) -> bool:
    model = zoo.build(family, head)
    found = find_family(type(model.base_model))
    return found is not None and found.reads_first_token_alone(type(model), model)


CASES = [
    (family, head)
    for family, head in zoo.CASES
    if head in ("ForSequenceClassification", "ForMultipleChoice")
]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each feed-forward of the engine has run over."""
    seen: list[int] = []
    original = engine.linear.run_feed_forward

    def spy(x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(x.shape[0])
        return original(x, *rest)

    monkeypatch.setattr(engine.linear, "run_feed_forward", spy)
    return seen


def _logits(model: nn.Module, calls: list[dict]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(**call).logits for call in calls])


def _error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Their root mean square: of so few numbers, the largest error is a matter of luck."""
    return float((logits.double() - exact).square().mean().sqrt())


@pytest.mark.parametrize("kind", ["none", "right", "left", "empty_row"])
@pytest.mark.parametrize(("family", "head"), CASES, ids=lambda case: case)
def test_same_logits(family: str, head: str, kind: str, rows: list[int]) -> None:
    if kind == "left" and zoo.refuses_left_padding(family, head):
        pytest.skip("the original forward runs: test_families covers it")
    model = zoo.build(family, head)
    calls = [call_for(family, head, kind) for _ in range(1 if kind == "empty_row" else 4)]
    before = _logits(model, calls)
    after = _logits(encoder_fast.patch(model, strict=True), calls)
    pruned = _is_first_token_head(family, head)
    assert (rows[-1] == 4) == pruned
    assert rows[0] > 4
    if kind == "empty_row":  # the original pools what attends to nothing there
        mask = calls[0]["attention_mask"].flatten(0, -2)
        real = (mask.sum(-1) > 0).view(*before.shape[:-1], -1).expand_as(before)
        after, before = after[real], before[real]
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        return
    exact = _logits(encoder_fast.unpatch(model).double(), calls)
    floor = torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert _error(after, exact) <= 2 * _error(before, exact) + floor


def test_first_token_heads_are_known() -> None:
    """The ones that this is for; a renamed head class would silently lose it."""
    for family in ("bert", "roberta", "distilbert", "electra", "albert"):
        assert _is_first_token_head(family, "ForSequenceClassification"), family
    assert _is_first_token_head("electra", "ForMultipleChoice")
    for head in ("ForTokenClassification", "ForMaskedLM", "ForPreTraining", "ForQuestionAnswering"):
        assert not _is_first_token_head("bert", head)


def _full(rows: list[int]) -> bool:
    """Whether the last layer ran over as many tokens as the first."""
    return rows[-1] == rows[0] > 4


def test_the_encoder_called_by_itself_gives_every_token(rows: list[int]) -> None:
    model = encoder_fast.patch(zoo.build("bert", "ForSequenceClassification"))
    call = inputs("right")
    with torch.inference_mode():
        assert model.bert(**call).last_hidden_state.shape[:2] == call["input_ids"].shape
    assert _full(rows)


def test_hidden_states_asked_for(rows: list[int]) -> None:
    model = encoder_fast.patch(zoo.build("bert", "ForSequenceClassification"))
    with torch.inference_mode():
        model(**inputs("right"), output_hidden_states=True)
    assert _full(rows)


@pytest.mark.parametrize("where", ["bert", "bert.pooler", "bert.pooler.dense", "classifier"])
def test_a_hook_sees_every_token(where: str, rows: list[int]) -> None:
    model = encoder_fast.patch(zoo.build("bert", "ForSequenceClassification"))
    model.get_submodule(where).register_forward_hook(lambda *_: None)
    with torch.inference_mode():
        model(**inputs("right"))
    assert _full(rows)


class MeanHead(nn.Module):
    """A head of the user's own, in the place of one that reads the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(48, 2)

    def forward(self, features: torch.Tensor, **_: object) -> torch.Tensor:
        return self.out(features.mean(dim=1))


@pytest.mark.parametrize("replacement", [MeanHead, lambda: nn.Linear(48, 2)])
def test_a_replaced_head_gets_every_token(replacement: object, rows: list[int]) -> None:
    model = encoder_fast.patch(zoo.build("roberta", "ForSequenceClassification"))
    model.classifier = replacement().to(DEVICE)
    with torch.inference_mode():
        model(**call_for("roberta", "ForSequenceClassification", "right"))
    assert _full(rows)


def test_electra_told_to_take_another_token(rows: list[int]) -> None:
    model = zoo.build("electra", "ForMultipleChoice", summary_type="mean")
    with torch.inference_mode():
        encoder_fast.patch(model)(**call_for("electra", "ForMultipleChoice", "right"))
    assert _full(rows)


def test_a_subclass_with_a_forward_of_its_own_gets_every_token(rows: list[int]) -> None:
    model = zoo.build("bert", "ForSequenceClassification")

    class Mine(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            return super().forward(*args, **kwargs)

    model.__class__ = Mine
    with torch.inference_mode():
        encoder_fast.patch(model)(**inputs("right"))
    assert _full(rows)


def test_copies_pickles_and_unpatch(rows: list[int]) -> None:
    model = zoo.build("bert", "ForSequenceClassification")
    original, call = type(model), inputs("right")
    with torch.inference_mode():
        before = model(**call).logits
    encoder_fast.patch(model)
    assert type(model) is not original and isinstance(model, original)
    assert len(encoder_fast.report(model).encoders) == 1
    with torch.inference_mode():
        cloned = copy.deepcopy(model)
        cloned(**call)
        assert rows[-1] == 4
        assert type(pickle.loads(pickle.dumps(model))) is original
        with encoder_fast.patched(model):
            pass
        assert type(model) is not original
        encoder_fast.unpatch(model)
        assert type(model) is original
        assert torch.equal(model(**call).logits, before)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_packed_first_tokens(layers: int) -> None:
    model = encoder_fast.patch(zoo.build("bert", num_hidden_layers=layers))
    batch = pack_lengths([3, 0, 5, 1, 0])
    ids = torch.randint(2, zoo.VOCAB, (9,))
    with torch.inference_mode():
        every = encode_packed(model.to("cpu"), batch, ids)
        first = encode_packed(model, batch, ids, first_token_alone=True)
        none = encode_packed(model, pack_lengths([0, 0]), ids[:0], first_token_alone=True)
    torch.testing.assert_close(first[[0, 2, 3]], every[[0, 3, 8]], rtol=1e-5, atol=1e-5)
    assert not first[[1, 4]].any()
    assert none.shape == (2, 48) and not none.any()


def test_check_parity_of_a_patched_head() -> None:
    model = encoder_fast.patch(zoo.build("bert", "ForSequenceClassification"), strict=True)
    report = encoder_fast.check_parity(model, inputs())
    assert report.ok, str(report)
