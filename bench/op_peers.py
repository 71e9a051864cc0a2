"""Who else runs an op, each at its best setting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contestant import Unavailable, need
from bench.machine import Machine
from bench.op_attention import WINDOW, pad
from bench.op_case import EPS, Inputs, OpCase
from bench.ops import OPS
from bench.timing import Call


@dataclass(frozen=True, slots=True)
class Prepared:
    """A contestant ready to run: a call for each set of inputs, and how a result becomes packed."""

    calls: Sequence[Call]
    pack: Callable[[Any], Tensor] = lambda result: result


@dataclass(frozen=True, slots=True)
class OpPeer:
    """Somebody who runs an op; ``prepare`` raises :class:`Unavailable` where they can't."""

    label: str
    prepare: Callable[[Machine, OpCase, Sequence[Inputs]], Prepared]
    compiles: bool = False
    gpu_only: bool = False


def peers_of(op: str, machine: Machine) -> tuple[OpPeer, ...]:
    """Everybody who runs ``op`` on this kind of device, the plainest first."""
    peers = []
    if OPS[op].eager_races:
        peers = [
            OpPeer("PyTorch eager", _eager),
            OpPeer("torch.compile", _compiled, compiles=True),
        ]
    for peer in _SPECIAL.get(op, ()):
        # in miniature everybody of the GPU's field is asked, to see that asking works
        if machine.kind != "cpu" or not peer.gpu_only:
            peers.append(peer)
    return tuple(peers)


def _eager(machine: Machine, case: OpCase, sets: Sequence[Inputs]) -> Prepared:
    eager = OPS[case.op].eager
    return Prepared([lambda inputs=inputs: eager(inputs) for inputs in sets])


def _compiled(machine: Machine, case: OpCase, sets: Sequence[Inputs]) -> Prepared:
    _forbid(machine.is_fake, "nothing is compiled in miniature")
    # Graphs of its own would hide the launches that the timing already leaves out.
    mode = "max-autotune-no-cudagraphs" if machine.is_gpu else "default"
    run = torch.compile(OPS[case.op].eager, mode=mode, dynamic=False)
    return Prepared([lambda inputs=inputs: run(inputs) for inputs in sets])


def _sdpa(*backends: str) -> Callable[..., Prepared]:
    """SDPA on the padded batch; with backends named, those alone may run."""

    def prepare(machine: Machine, case: OpCase, sets: Sequence[Inputs]) -> Prepared:
        _forbid(bool(backends) and not machine.is_gpu, "needs an NVIDIA GPU")
        from torch.nn.attention import SDPBackend, sdpa_kernel

        full, windowed = case.workload.padding == 0, case.op == "window_attention"
        _forbid("FLASH_ATTENTION" in backends and not full, "takes no padding mask")
        chosen = [getattr(SDPBackend, name) for name in backends]
        valid = None

        def call_for(inputs: Inputs) -> Call:
            nonlocal valid
            qkv, valid = pad(case, inputs["qkv"])
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            mask = None if full else valid[:, None, None, :]
            if windowed:
                place = torch.arange(case.workload.longest, device=q.device)
                near = (place[:, None] - place).abs() <= WINDOW
                # where no key is near enough, padding sees itself: a row of nothing would be NaN
                own = place[:, None] == place
                mask = near & (valid[:, None, None, :] | own)

            def call() -> Tensor:
                only = sdpa_kernel(chosen) if chosen else contextlib.nullcontext()
                with only:
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

            return call

        calls = [call_for(inputs) for inputs in sets]
        return Prepared(calls, lambda out: out.transpose(1, 2)[valid])

    return prepare


def _torch_varlen(machine: Machine, case: OpCase, sets: Sequence[Inputs]) -> Prepared:
    _forbid(not machine.is_gpu, "needs an NVIDIA GPU")
    _forbid(case.dtype == torch.float32, "runs half precision alone")
    varlen_attn = need("torch.nn.attention.varlen", "torch's varlen_attn").varlen_attn

    def call_for(inputs: Inputs) -> Call:
        q, k, v = inputs["qkv"].unbind(1)
        bounds, longest = inputs["cu_seqlens"], inputs["longest"]
        # Before torch 2.11 it has no windows.
        window = {"window_size": (WINDOW, WINDOW)} if case.op == "window_attention" else {}
        return lambda: varlen_attn(q, k, v, bounds, bounds, longest, longest, **window)

    return Prepared([call_for(inputs) for inputs in sets])


def _flash_attn(module: str, package: str) -> Callable[..., Prepared]:
    """Dao's own varlen function, of FlashAttention 2 or 3."""

    def prepare(machine: Machine, case: OpCase, sets: Sequence[Inputs]) -> Prepared:
        _forbid(not machine.is_gpu, "needs an NVIDIA GPU")
        _forbid(case.dtype == torch.float32, "runs half precision alone")
        function = need(module, package).flash_attn_varlen_func

        def call_for(inputs: Inputs) -> Call:
            q, k, v = inputs["qkv"].unbind(1)
            bounds, longest = inputs["cu_seqlens"], inputs["longest"]
            window = (WINDOW, WINDOW) if case.op == "window_attention" else (-1, -1)
            return lambda: function(q, k, v, bounds, bounds, longest, longest, window_size=window)

        def pack(result: Any) -> Tensor:
            return result[0] if isinstance(result, tuple) else result

        return Prepared([call_for(inputs) for inputs in sets], pack)

    return prepare


def _flex(machine: Machine, case: OpCase, sets: Sequence[Inputs]) -> Prepared:
    _forbid(not machine.is_gpu, "needs an NVIDIA GPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    total = case.workload.tokens
    reach = WINDOW if case.op == "window_attention" else total
    lengths = torch.tensor(case.workload.lengths, device=machine.device)
    text = torch.repeat_interleave(torch.arange(len(lengths), device=machine.device), lengths)

    def same_text(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (text[i] == text[j]) & ((i - j).abs() <= reach)

    mask = create_block_mask(same_text, None, None, total, total, device=machine.device)
    run = torch.compile(flex_attention, dynamic=False)

    def call_for(inputs: Inputs) -> Call:
        q, k, v = inputs["qkv"].permute(1, 2, 0, 3).unsqueeze(1)
        return lambda: run(q, k, v, block_mask=mask)

    return Prepared([call_for(inputs) for inputs in sets], lambda out: out[0].transpose(0, 1))


def _liger(machine: Machine, case: OpCase, sets: Sequence[Inputs]) -> Prepared:
    _forbid(not machine.is_gpu, "needs an NVIDIA GPU")
    function = need("liger_kernel.ops.layer_norm", "liger-kernel").LigerLayerNormFunction

    def call_for(inputs: Inputs) -> Call:
        # It has no form with a residual: the sum is a kernel of its own.
        x, residual, weight, bias = (inputs[k] for k in ("x", "residual", "weight", "bias"))
        return lambda: function.apply(x + residual, weight, bias, EPS)

    return Prepared([call_for(inputs) for inputs in sets])


def _masked_mean(machine: Machine, case: OpCase, sets: Sequence[Inputs]) -> Prepared:
    def call_for(inputs: Inputs) -> Call:
        padded, valid = pad(case, inputs["x"])
        mask = valid.unsqueeze(-1).float()
        return lambda: (padded.float() * mask).sum(dim=1) / mask.sum(dim=1)

    return Prepared([call_for(inputs) for inputs in sets])


def _forbid(condition: bool, reason: str) -> None:
    if condition:
        raise Unavailable(reason)


_VARLEN = (
    OpPeer("torch varlen_attn", _torch_varlen, gpu_only=True),
    OpPeer("flash-attn 2 varlen", _flash_attn("flash_attn", "flash-attn"), gpu_only=True),
    OpPeer(
        "flash-attn 3 varlen", _flash_attn("flash_attn_interface", "flash-attn 3"), gpu_only=True
    ),
    OpPeer("FlexAttention", _flex, compiles=True, gpu_only=True),
)

_SPECIAL: dict[str, tuple[OpPeer, ...]] = {
    "attention": (
        OpPeer("SDPA, padded", _sdpa()),
        OpPeer("SDPA flash", _sdpa("FLASH_ATTENTION"), gpu_only=True),
        OpPeer("SDPA cuDNN", _sdpa("CUDNN_ATTENTION"), gpu_only=True),
        *_VARLEN,
    ),
    "window_attention": (OpPeer("SDPA, padded", _sdpa()), *_VARLEN),
    "add_layer_norm": (OpPeer("Liger LayerNorm", _liger, gpu_only=True),),
    "pool": (OpPeer("masked mean, padded", _masked_mean),),
}
