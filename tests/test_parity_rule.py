"""check_parity itself: which tokens it compares, and outputs of a few numbers."""

from collections.abc import Callable

import pytest
import torch
import zoo
from berts import DEVICE, inputs, tiny
from torch import Tensor, nn

import encoder_fast
from encoder_fast import parity
from encoder_fast.parity import compare


class Wrapper(nn.Module):
    """Has a config, as check_parity asks, and a forward of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config


class OwnMask(Wrapper):
    """Finds out by itself what is padding, and returns a tensor."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids, attention_mask=(input_ids != 0).long())[0]


class Longer(Wrapper):
    """Two virtual tokens in front, as prompt tuning has them."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **flags: bool) -> object:
        front = torch.full_like(input_ids[:, :2], 9)
        mask = torch.cat([torch.ones_like(front), attention_mask], dim=1)
        return self.inner(torch.cat([front, input_ids], dim=1), attention_mask=mask, **flags)


class Shorter(Wrapper):
    """What it returns fits no mask, its own or the encoder's."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **flags: bool) -> dict:
        hidden = self.inner(input_ids, attention_mask=attention_mask, **flags)[0]
        return {"last_hidden_state": hidden[:, :5]}


class Twice(Wrapper):
    """Calls its encoder with two masks."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **flags: bool) -> dict:
        one = self.inner(input_ids, attention_mask=attention_mask)[0]
        other = self.inner(input_ids, attention_mask=attention_mask.flip(0))[0]
        return {"last_hidden_state": one + other}


def right_padded() -> dict[str, Tensor]:
    call = inputs("right")
    del call["token_type_ids"]
    call["input_ids"] = (call["input_ids"].clamp(min=5) * call["attention_mask"]).contiguous()
    return call


@pytest.mark.parametrize("wrap", [OwnMask, Longer])
@pytest.mark.parametrize("head", ["BertModel", "BertForTokenClassification"])
@pytest.mark.parametrize("patched", [True, False])
def test_tokens_that_the_encoder_is_told_of(
    wrap: type[Wrapper], head: str, patched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, call = wrap(tiny(head)).eval(), right_padded()
    if wrap is OwnMask:
        del call["attention_mask"]
    if patched:
        encoder_fast.patch(model)
    report = encoder_fast.check_parity(model, call)
    assert report.ok, str(report)
    monkeypatch.setattr(parity, "MORE_INPUTS", (2,))  # for time's sake
    # all real tokens are compared: a fault at the last one of the longest text shows
    encoder_fast.patch(model)
    model.register_forward_hook(spoil)
    assert not encoder_fast.check_parity(model, call).ok


def spoil(module: nn.Module, args: tuple, output: object) -> None:
    if any(hasattr(m, "_encoder_fast") for m in module.modules()):
        (output if isinstance(output, Tensor) else output[0])[0, -1] += 1


@pytest.mark.parametrize(
    ("wrap", "message"),
    [(Shorter, "no attention_mask is of shape"), (Twice, "different masks of shape")],
)
def test_tokens_that_nobody_can_tell(wrap: type[Wrapper], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder_fast.check_parity(wrap(tiny()).eval(), right_padded())


def test_replaced_tokens_within_a_wrapper() -> None:
    class Handing(Wrapper):
        def forward(self, **call: object) -> object:
            return self.inner(**call)

    model = Handing(zoo.build("electra", "ForPreTraining")).eval()
    report = encoder_fast.check_parity(model, inputs("right"))
    assert report.ok, str(report)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_prompt_tuned() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny("BertForTokenClassification"), settings).to(DEVICE).eval()
    report = encoder_fast.check_parity(model, right_padded())
    assert report.ok, str(report)
    assert len(report.rows) == 4


def triple(ours: Tensor, theirs: Tensor) -> parity._Triple:
    exact = torch.ones(ours.shape, dtype=torch.float64)
    return parity._Triple((exact + ours).float(), (exact + theirs).float(), exact)


def test_few_numbers_are_judged_over_several_inputs() -> None:
    """Errors of one number a text: the original is exact in the first by luck."""
    torch.manual_seed(0)
    noise = 1e-5 * torch.randn(2, 64, 1, 1, dtype=torch.float64)
    theirs = [triple(a, b) for a, b in zip(*noise, strict=True)]
    lucky = triple(torch.full((1, 1), 1e-5, dtype=torch.float64), torch.zeros(1, 1))
    assert not compare("x", lucky.ours, lucky.theirs, lucky.exact).ok
    assert parity._compare_all("x", [lucky, *theirs]).ok
    wrong = [triple(3 * a, b) for a, b in zip(*noise, strict=True)]
    assert not parity._compare_all("x", wrong).ok
    # a fault in the first input alone is not lost among the others
    one = triple(torch.full((1, 1), 1e-4, dtype=torch.float64), torch.zeros(1, 1))
    assert not parity._compare_all("x", [one, *theirs]).ok


def scale(model: nn.Module) -> None:
    query = model.bert.encoder.layer[1].attention.self.query
    query.weight.mul_(1.001)
    query.bias.mul_(1.001)


def bias(model: nn.Module) -> None:
    model.bert.encoder.layer[1].output.dense.bias.zero_()


def token(model: nn.Module) -> None:
    model.bert.embeddings.word_embeddings.weight[11] = 0


def epsilon(model: nn.Module) -> None:
    model.bert.encoder.layer[1].output.LayerNorm.eps = 1e-5


@pytest.mark.parametrize("plant", [scale, bias, token, epsilon])
@pytest.mark.parametrize("seed", range(2))
def test_faults_show_in_few_numbers(
    plant: Callable[[nn.Module], None], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text, one number, the hidden states left out: the patched model alone has the fault."""

    class Logits(Wrapper):
        def forward(self, **call: Tensor) -> Tensor:
            call = {n: v for n, v in call.items() if not n.startswith(("output", "return"))}
            return self.inner(**call).logits

    def build() -> nn.Module:
        return Logits(tiny("BertForSequenceClassification", seed=seed, num_labels=1)).eval()

    sound, faulty, copy = build(), build(), parity._copy
    call = {"input_ids": torch.tensor([[5, 11, 7]], device=DEVICE)}
    assert encoder_fast.check_parity(sound, call).ok
    with torch.no_grad():
        plant(faulty.inner)
    monkeypatch.setattr(parity, "_copy", lambda module, attention: copy(sound, attention))
    report = encoder_fast.check_parity(faulty, call)
    assert not report.ok, str(report)
    assert report.rows[0].inputs == 1 + parity.MORE_INPUTS[-1]
