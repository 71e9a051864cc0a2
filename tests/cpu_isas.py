"""What the tests of the CPU's own kernels share: instruction sets, and who computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from berts import DEVICE
from layer_norm_oracle import layer_norm_float64
from test_ops import check, cumulative, distance_attention

from encoder_fast.backends import cpu, cpu_attention, cpu_kernels
from encoder_fast.ops.add_layer_norm import add_layer_norm, add_layer_norm_sum
from encoder_fast.ops.attention import attention

INSTRUCTIONS = ("AVX2", "AVX-512", "AVX-512 with bfloat16")


HERE = cpu_kernels.isa

_WHY_NOT = cpu_kernels.why_not() or ""

# An extension that is stale or does not load is a fault, and no test may pass it over.
_CAN_LACK_THEM = "is not built" in _WHY_NOT or "this processor lacks" in _WHY_NOT

MARKS = [
    pytest.mark.skipif(DEVICE != "cpu", reason="kernels of the CPU"),
    pytest.mark.skipif(_CAN_LACK_THEM, reason=_WHY_NOT),
]


@pytest.fixture(params=INSTRUCTIONS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    number = INSTRUCTIONS.index(request.param) + 1
    if number > HERE:
        pytest.skip(f"this processor has {cpu_kernels.instructions()} at most")
    monkeypatch.setattr(cpu_kernels, "isa", number)
    return number


@pytest.fixture
def threads() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.fixture(autouse=True)
def pytorch_is_not_asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the kernels fails where PyTorch computes in their place; by `seen` it may."""
    assert HERE > 0, _WHY_NOT
    if "seen" in request.fixturenames:
        return

    def refuse(*_: object) -> None:
        raise AssertionError("the kernel was passed by")

    # what attention by PyTorch calls whatever the dtype and the lengths
    monkeypatch.setattr(cpu_attention, "_most_scores", refuse)
    monkeypatch.setattr(_own_functional(monkeypatch), "layer_norm", refuse)


def _own_functional(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the CPU backend calls PyTorch's functions by. In their own place, a patched model would
    notice that they were replaced, and fall back."""
    functional = SimpleNamespace(**vars(F))
    monkeypatch.setattr(cpu, "F", functional)
    return functional


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory, of results and workspaces, is NaN: what is left out or read too soon shows."""
    new_empty = torch.Tensor.new_empty

    def new_nan(x: torch.Tensor, *size: object, **options: object) -> torch.Tensor:
        return new_empty(x, *size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What PyTorch was asked for."""
    calls: list[str] = []
    functional = _own_functional(monkeypatch)
    for place, name in ((cpu_attention, "_most_scores"), (functional, "layer_norm")):
        monkeypatch.setattr(place, name, _spied(getattr(place, name), name, calls))
    return calls


def _spied(original: Callable[..., object], name: str, calls: list[str]) -> Callable[..., object]:
    def spy(*args: object) -> object:
        calls.append(name)
        return original(*args)

    return spy


def attend_and_check(
    qkv: torch.Tensor,
    counts: list[int],
    window: int | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each sequence by the parity rule; the scale is 0.25, as the oracle's."""
    output = attention(
        *qkv.unbind(1),
        cumulative(counts),
        max(counts, default=0),
        softmax_scale=0.25,
        window_size=window,
        relative_bias=bias,
        backend="cpu",
    )
    for rows in torch.arange(sum(counts)).split(counts):
        if len(rows):
            eager, exact = (
                distance_attention(qkv[rows].to(dtype), window, bias)
                for dtype in (qkv.dtype, torch.float64)
            )
            check(output[rows], eager, exact)
    return output


def norm_and_check(
    x: torch.Tensor, vectors: dict[str, torch.Tensor], residual: torch.Tensor | None = None
) -> None:
    x_bias, weight, bias = (vectors.get(name) for name in ("x_bias", "weight", "bias"))
    terms = [term for term in (x, x_bias, residual) if term is not None]
    total = sum(terms[1:], terms[0])
    eager = torch.layer_norm(total, x.shape[1:], weight, bias, 1e-5)
    # the oracle stacks its terms, and a vector is one for every row
    exact = layer_norm_float64([t.expand_as(x) for t in terms], weight, bias, 1e-5)
    output = add_layer_norm(x, residual, weight, bias, 1e-5, x_bias=x_bias, backend="cpu")
    check(output, eager, exact)
    if residual is not None:
        both = add_layer_norm_sum(x, residual, weight, bias, 1e-5, x_bias=x_bias, backend="cpu")
        assert torch.equal(both[0], output)
        check(both[1], total, sum(t.double() for t in terms))
