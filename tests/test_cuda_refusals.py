"""What the CUDA backend has no kernel for is refused by name, when a model is patched."""

import pytest
import torch
import zoo
from kernel_backends import DEVICE, kernel_backends

import encoder_fast
from encoder_fast.ops.attention import attention
from encoder_fast.ops.rotary import rotary

CUDA = [name for name in kernel_backends() if name.startswith("cuda")]


@pytest.mark.parametrize("backend", CUDA)
@pytest.mark.parametrize(
    ("family", "lacking"),
    [
        ("modernbert", "rotary, window_size"),
        ("mpnet", "relative_bias"),
    ],
)
def test_a_model_that_needs_more(family: str, lacking: str, backend: str) -> None:
    model = zoo.build(family).half()
    with pytest.raises(encoder_fast.UnsupportedModelError, match=f"has no {lacking}"):
        encoder_fast.patch(model, backend=backend)
    assert encoder_fast.report(model).encoders == ()


@pytest.mark.parametrize("backend", CUDA)
def test_heads_of_a_size_without_positions(backend: str) -> None:
    # Plain attention has 128.
    sizes = {"hidden_size": 256, "num_attention_heads": 2}
    model = zoo.build("deberta_v2", **sizes).half()
    with pytest.raises(
        encoder_fast.UnsupportedModelError,
        match=r"runs head sizes \[32, 64\] in disentangled_attention, got 128",
    ):
        encoder_fast.patch(model, backend=backend)


@pytest.mark.parametrize("backend", CUDA)
def test_an_op_that_it_lacks(backend: str) -> None:
    x = torch.zeros(4, 3, 1, 32, dtype=torch.float16, device=DEVICE)
    tables = torch.zeros(2, 4, 16, device=DEVICE)
    with pytest.raises(ValueError, match="has no rotary"):
        rotary(x, *tables, backend=backend)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="without window_size"):
        attention(*x.unbind(1), cu_seqlens, 4, window_size=1, backend=backend)


@pytest.mark.parametrize("backend", CUDA)
def test_a_window_that_reaches_everything_is_none(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 1, 32, device=DEVICE).half()
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    plain, windowed = (
        attention(*x.unbind(1), cu_seqlens, 4, window_size=window, backend=backend)
        for window in (None, 3)
    )
    assert torch.equal(plain, windowed)
