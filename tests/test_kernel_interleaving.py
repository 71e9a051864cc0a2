"""The programs of each Triton kernel interleaved: no result depends on their order, and where two
touch one element, of which one writes it, both do so atomically."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from attention_oracle import DEVICE, cumulated, random_qkv
from disentangled_oracle import problem
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpretedFunction

from encoder_fast.kernels import integers, pack_mask
from encoder_fast.kernels.add_layer_norm import add_layer_norm
from encoder_fast.kernels.attention import attention
from encoder_fast.kernels.disentangled_attention import disentangled_attention
from encoder_fast.kernels.embed_layer_norm import embed_layer_norm
from encoder_fast.kernels.gated import gated
from encoder_fast.kernels.local_attention import local_attention
from encoder_fast.kernels.rotary import rotary

if DEVICE == "cuda":
    pytest.skip("Triton interprets nothing where there is a GPU", allow_module_level=True)

from triton_interleaving import interleaved

SEEDS = (0, 1)


@triton.jit
def count_kernel(p_count, p_seen, HOW: tl.constexpr):
    i_program = tl.program_id(0)
    if HOW == "plain":
        tl.store(p_count, tl.load(p_count) + 1)
    else:
        tl.atomic_add(p_count, 1)
    if HOW == "reads another's":
        tl.load(p_seen + (i_program + 1) % 8)
    tl.store(p_seen + (i_program // 2 if HOW == "writes another's" else i_program), 7)


def count(how: str) -> Tensor:
    counted = torch.zeros(9, dtype=torch.int32)
    count_kernel[(8,)](counted, counted[1:], HOW=how)
    return counted


def test_a_counter() -> None:
    for seed in range(10):
        with interleaved(seed) as launched:
            assert count("atomic").tolist() == [8, *[7] * 8]
        assert launched == ["count_kernel"]


def test_a_counter_that_is_not_atomic() -> None:
    assert count("plain")[0] == 8, "the interpreter's own order hides it"
    for seed in range(10):
        counted = torch.zeros(9, dtype=torch.int32)
        race = pytest.raises(Exception, match="1 races, of byte 0 of p_count")
        with race as raised, interleaved(seed):
            count_kernel[(8,)](counted, counted[1:], HOW="plain")
        assert raised.value.__notes__ == [f"programs interleaved by seed {seed}"]
        assert counted[0] < 8


@pytest.mark.parametrize("how", ("reads another's", "writes another's"))
def test_programs_that_meet(how: str) -> None:
    # What is read is not used, and all write the same: the result shows neither.
    assert count(how)[0] == 8
    with pytest.raises(Exception, match=r"races, of byte \d+ of p_seen"), interleaved(0):
        count(how)
    if how == "writes another's":
        with interleaved(0, one_value=True):
            count(how)


@pytest.mark.parametrize("elements", (8, 1))
def test_outside_the_operands(elements: int) -> None:
    seen = torch.zeros(elements, dtype=torch.int32)
    outside = pytest.raises(Exception, match=r"outside every operand, at byte \d+ of p")
    with outside, interleaved(0):
        count_kernel[(9,)](torch.zeros(1, dtype=torch.int32), seen, HOW="atomic")


def test_an_error_in_a_program_is_passed_on() -> None:
    with pytest.raises(Exception, match="HOW"), interleaved(0):
        count_kernel[(8,)](torch.zeros(9), torch.zeros(9))


def attend(lengths: tuple[int, ...], **options: Tensor) -> Tensor:
    q, k, v = random_qkv(sum(lengths), 70, 2, 16, torch.float16).unbind(1)
    return attention(q, k, v, cumulated(lengths), max(lengths), 0.25, **options)


def attend_within_a_window() -> Tensor:
    q, k, v = random_qkv(203, 70, 2, 16, torch.float16).unbind(1)
    return local_attention(q, k, v, cumulated((3, 200)), 200, 0.25, 30)


def turn() -> Tensor:
    qkv = torch.randn(80, 3, 2, 32)
    rotary(qkv, torch.randn(80, 16), torch.randn(80, 16))
    return qkv


def normalise() -> tuple[Tensor, ...]:
    x, residual = torch.randn(2, 19, 40)
    total = torch.empty_like(x)
    return add_layer_norm(x, residual, None, None, 1e-5, sum_out=total), total


def embed() -> Tensor:
    word, position = torch.randn(50, 40), torch.randn(20, 40)
    ids = torch.randint(0, 50, (19,)), torch.arange(19)
    return embed_layer_norm(*ids, None, word, position, None, None, None, 1e-5)


def pack() -> tuple[Tensor, ...]:
    mask = torch.randint(0, 3, (19, 7))
    mask[-3:, 4:] = 0  # the last program's longest row is not the longest of all
    facts, lengths, headless = pack_mask.count_tokens(mask, torch.randint(0, 9, (19, 7)), 8, True)
    total, onlookers = facts[0].item(), facts[2].item()
    places = pack_mask.place_tokens(mask, lengths, headless, total, onlookers)
    return facts, lengths, headless, *(place for place in places if place is not None)


# Each with several programs, and rows behind the last sequence for all of them to clear.
CALLS: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]] = {
    "attention-packed": lambda: attend((30, 0, 20, 31, 25)),
    "attention-one-tile": lambda: attend((60, 0, 20, 64)),
    "attention-loop": lambda: attend((130, 0, 3, 3)),
    "attention-biased": lambda: attend((130, 3), relative_bias=torch.randn(2, 9)),
    "local-attention": attend_within_a_window,
    "disentangled-attention": lambda: disentangled_attention(
        *problem((70, 3), torch.float16, head_dim=16, tail=70).arguments
    ),
    "add-layer-norm": normalise,
    "embed-layer-norm": embed,
    "gated": lambda: gated(torch.randn(19, 260), "gelu"),
    "rotary": turn,
    "pack-mask": pack,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_result_depends_on_the_order_of_programs(
    call: Callable[[], Tensor | tuple[Tensor, ...]],
) -> None:
    def results() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        found = call()
        return (found,) if isinstance(found, Tensor) else found

    expected = results()
    for seed in SEEDS:
        # In the counts of a mask whoever sees a gap stores the same 1.
        with interleaved(seed, one_value=call is pack):
            for one, other in zip(results(), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_every_kernel_is_among_them_and_launched_on_its_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched, scopes = set(), [0]

    @contextmanager
    def device_of(operand: Tensor) -> Iterator[None]:
        assert operand.device == torch.device(DEVICE)
        scopes.append(0)
        yield
        assert scopes.pop() == 1, "one launch a scope"

    def launch(self: GridExecutor, *_: object, **__: object) -> None:
        launched.add(self.fn.__name__)
        scopes[-1] += 1

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", launch)
    for call in CALLS.values():
        call()
    assert scopes == [0], "Triton launches on the current device, which is another's"
    names = (path.stem for path in Path(integers.__file__).parent.glob("*.py"))
    modules = [importlib.import_module(f"encoder_fast.kernels.{name}") for name in names]
    functions = [x for m in modules for x in vars(m).values() if isinstance(x, InterpretedFunction)]
    kernels = {function.fn.__name__ for function in functions}
    assert launched == {name for name in kernels if name.endswith("_kernel")}
