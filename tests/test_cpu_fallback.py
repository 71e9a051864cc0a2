"""What the CPU's own kernels leave to PyTorch, and why; and models with and without them."""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from berts import DTYPES, inputs, tiny
from cpu_isas import (
    INSTRUCTIONS,
    MARKS,
    attend_and_check,
    isa,
    norm_and_check,
    pytorch_is_not_asked,
    seen,
)
from test_ops import check, cumulative, distance_attention
from test_packaging import python, succeed

import encoder_fast
from encoder_fast.backends import cpu_attention, cpu_kernels
from encoder_fast.ops.add_layer_norm import add_layer_norm
from encoder_fast.ops.add_layer_norm import operator as add_layer_norm_operator
from encoder_fast.ops.attention import attention
from encoder_fast.ops.attention import operator as attention_operator

pytestmark = MARKS

__all__ = ["isa", "pytorch_is_not_asked", "seen"]  # fixtures


REST = (None, None, None, 1e-5, None, "cpu")  # add_layer_norm's arguments behind x


@pytest.mark.parametrize("default", [torch.float16, torch.float64], ids=["fp16", "fp64"])
def test_other_defaults_of_device_and_dtype(default: torch.dtype) -> None:
    qkv = torch.randn(40, 3, 2, 32)
    bias, cu_seqlens = torch.randn(2, 21), cumulative([33, 7])

    # As the engine does: the dispatcher, past which this goes, would put the default device aside.
    def call() -> torch.Tensor:
        return attention_operator.run(*qkv.unbind(1), cu_seqlens, 33, 0.25, None, bias, "cpu")

    expected = call()
    try:
        torch.set_default_dtype(default)
        with torch.device("meta"):
            output = call()
            normed = add_layer_norm_operator.run(qkv.flatten(1), *REST)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output, expected) and normed.device.type == "cpu"


def test_a_tensor_without_memory_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.undo()
    q, bounds = torch.randn(9, 2, 16), cumulative([9])
    rows, weight = q.flatten(1), torch.ones(32)
    with FakeTensorMode() as mode:
        fake = add_layer_norm_operator.run(mode.from_tensor(rows), *REST)
    assert fake.shape == (9, 32)

    class Named(torch.Tensor):
        pass

    for x, w in ((rows.as_subclass(Named), weight), (rows, weight.as_subclass(Named))):
        assert not cpu_kernels.normalises(x, None, w, None, None)
    assert cpu_kernels.normalises(rows, None, torch.nn.Parameter(weight), None, None)
    assert cpu_kernels.attends(q, q, q, bounds, None)
    assert not cpu_kernels.attends(q, q, q.as_subclass(Named), bounds, None)
    traced = torch.jit.trace(lambda x: add_layer_norm_operator.run(x, *REST), rows)
    other = torch.randn(9, 32)
    assert torch.equal(traced(other), F.layer_norm(other, (32,)))


@pytest.mark.parametrize("why", ["no kernels", "head size", "wide heads", "AMX"])
def test_what_is_left_to_pytorch(
    why: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size, dtype = {"head size": 24, "wide heads": 208}.get(why, 16), torch.float32
    if why == "no kernels":
        monkeypatch.setattr(cpu_kernels, "isa", 0)
    elif why == "AMX":
        dtype = torch.bfloat16
        monkeypatch.setattr(cpu_kernels, "_LEFT_TO_PYTORCH", (torch.bfloat16,))
        monkeypatch.setattr(cpu_attention, "has_onednn", lambda dtype: True)
    attend_and_check(torch.randn(170, 3, 2, size).to(dtype), [100, 70])
    assert seen == ["_most_scores"]


# A window of fewer keys than a block of its queries, and of more than a sequence has.
@pytest.mark.parametrize("option", ["plain", "window-20", "window-200", "bias-10", "bias-300"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.usefixtures("seen")
def test_attention_by_pytorch(
    size: int, dtype: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "attention", None)  # a call of it is an error
    if size % 16 == 0:
        monkeypatch.setattr(cpu_kernels, "isa", 0)
    kind, _, number = option.partition("-")
    counts = [15, 0, 1, 63, 64, 65, 257]
    qkv = torch.randn(sum(counts) + 3, 3, 2, size).to(DTYPES[dtype])
    window = int(number) if kind == "window" else None
    bias = torch.randn(2, 2 * int(number) + 1) if kind == "bias" else None
    output = attend_and_check(qkv, counts, window, bias)
    assert (output[sum(counts) :] == 0).all()


@pytest.mark.parametrize("way", ["kernel", "PyTorch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cu_seqlens", [[1, 9], [0, 6, 5, 9], [0, 10], [0, -1], [0] * 30 + [10]])
@pytest.mark.usefixtures("seen")
def test_bounds_that_make_no_sense(
    cu_seqlens: list[int], dtype: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "PyTorch":
        monkeypatch.setattr(cpu_kernels, "isa", 0)
    q = torch.randn(9, 1, 16).to(DTYPES[dtype])
    bounds = torch.tensor(cu_seqlens, dtype=torch.int32)
    shown = ", ".join(map(str, cu_seqlens[:20]))
    message = (
        f"cu_seqlens must begin with 0, never fall and end with 9 tokens at most, got [{shown}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(q, q, q, bounds, 30, backend="cpu")


@pytest.mark.parametrize("way", ["kernel", "PyTorch"])
@pytest.mark.parametrize(("longest", "max_seqlen"), [(9, 8), (1, 0)])
@pytest.mark.usefixtures("seen")
def test_a_max_seqlen_that_is_too_small(
    longest: int, max_seqlen: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "PyTorch":
        monkeypatch.setattr(cpu_kernels, "isa", 0)
    q = torch.randn(9, 1, 16)
    message = f"the longest sequence or more, got {max_seqlen} for one of {longest} tokens"
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, cumulative([longest]), max_seqlen, backend="cpu")


def test_float64_is_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "attention", None)
    qkv, bounds = torch.randn(40, 3, 2, 32, dtype=torch.float64), cumulative([40])
    assert not cpu_kernels.attends(*qkv.unbind(1), bounds, None)
    assert not cpu_kernels.normalises(qkv.flatten(1), None)
    output = attention(*qkv.unbind(1), bounds, 40, softmax_scale=0.25, backend="reference")
    exact = distance_attention(qkv, None, None)
    assert output.dtype == torch.float64
    check(output, exact, exact)


def test_norms_that_are_left_to_pytorch(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(5, 64)
    add_layer_norm(rows, backend="cpu")
    assert not seen
    add_layer_norm(torch.randn(5, 24), backend="cpu")
    add_layer_norm(rows[:, :32], rows[:, :32], backend="cpu")  # not contiguous
    add_layer_norm(rows.half(), None, torch.ones(64, dtype=torch.float16), backend="cpu")
    assert seen == ["layer_norm"] * 2
    monkeypatch.setattr(cpu_kernels, "isa", 0)
    add_layer_norm(rows, backend="cpu")
    assert seen == ["layer_norm"] * 3


def test_operands_that_do_not_fit_are_left_to_pytorch() -> None:
    q, bounds = torch.randn(9, 2, 16), cumulative([9])
    assert cpu_kernels.attends(q, q, q, bounds, torch.randn(2, 3))
    assert not cpu_kernels.attends(q, q[:3], q, bounds, None)
    assert not cpu_kernels.attends(q, q, q.half(), bounds, None)
    assert not cpu_kernels.attends(q, q, q, bounds.long(), None)
    assert not cpu_kernels.attends(q, q, q, torch.zeros(4, dtype=torch.int32)[::2], None)
    assert not cpu_kernels.attends(q, q, q, bounds, torch.randn(1, 3))
    rows = torch.randn(4, 32)
    assert not cpu_kernels.normalises(rows, rows[:1], None)
    assert not cpu_kernels.normalises(rows, None, rows[0, :16])
    zeros = torch._efficientzerotensor((4, 32))
    assert not cpu_kernels.normalises(zeros, None, None)
    assert not cpu_kernels.normalises(rows, torch._neg_view(rows), None)


@pytest.mark.parametrize("width", [24, 48])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("seen")
def test_a_norm_by_pytorch(dtype: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "add_layer_norm", None)  # a call of it is an error
    if width % 16 == 0:
        monkeypatch.setattr(cpu_kernels, "isa", 0)
    x, residual = torch.randn(2, 37, width).to(DTYPES[dtype])
    everything = {name: torch.randn(width).to(x.dtype) for name in ("x_bias", "weight", "bias")}
    for some in ({}, everything):
        norm_and_check(x, some)
        norm_and_check(x, some, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_a_whole_model(dtype: str, seen: list[str]) -> None:
    model = tiny().to(DTYPES[dtype])
    encoder_fast.patch(model, strict=True)
    with torch.inference_mode():
        model(**inputs("right"))
    assert not seen
    result = encoder_fast.check_parity(model, inputs("right"))
    assert result.ok, result


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_model_by_pytorch(
    dtype: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "isa", 0)
    model = tiny().to(DTYPES[dtype])
    encoder_fast.patch(model, strict=True)
    with torch.inference_mode():
        model(**inputs("right"))
    assert {"_most_scores", "layer_norm"} <= set(seen)
    result = encoder_fast.check_parity(model, inputs("right"))
    assert result.ok, result


def test_the_names_of_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("none", *INSTRUCTIONS)):
        monkeypatch.setattr(cpu_kernels, "isa", number)
        assert cpu_kernels.instructions() == name


def test_a_processor_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules,
        "encoder_fast._cpu",
        SimpleNamespace(best_isa=lambda: 0, INTERFACE=cpu_kernels.INTERFACE),
    )
    assert cpu_kernels._load() == (None, "this processor lacks AVX2, FMA or F16C")


def test_what_info_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"kernels for {cpu_kernels.instructions()}" in encoder_fast.info().cpu
    monkeypatch.setattr(cpu_kernels, "_reason", "nobody built them")
    assert "no kernels of its own: nobody built them" in encoder_fast.info().cpu


# Runs a model where the extension is missing, or is no extension at all.
WITHOUT = """
import sys
import encoder_fast
{hide}
from berts import inputs, tiny
from encoder_fast.backends import cpu_kernels
model = encoder_fast.patch(tiny(), strict=True)
assert encoder_fast.check_parity(model, inputs("right")).ok
assert cpu_kernels.isa == 0
print(cpu_kernels.why_not())
"""


@pytest.mark.parametrize(
    ("hide", "reason"),
    [
        ("sys.modules['encoder_fast._cpu'] = None", "_cpu is not built; that takes a C++ compiler"),
        ("encoder_fast.__path__.insert(0, {folder!r})", "_cpu does not load: "),
        ("sys.modules['encoder_fast._cpu'] = sys", "_cpu was built from other sources"),
    ],
    ids=["missing", "broken", "other sources"],
)
def test_a_model_runs_without_the_extension(hide: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not ELF")
    code = WITHOUT.format(hide=hide.format(folder=str(tmp_path)))
    paths = [path for path in sys.path if path.endswith("tests")]
    assert reason in succeed(python(f"import sys; sys.path += {paths!r}\n{code}", tmp_path))
