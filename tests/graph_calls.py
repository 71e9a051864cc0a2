"""What tests of CUDA graphs share: backends, calls, and what came of them."""

import copy
from collections.abc import Sequence

import frozen_recorder
import pytest
import torch
import zoo
from berts import DEVICE
from torch import Tensor, nn

import encoder_fast
from encoder_fast.parity import compare

# Of one bucket: 33 to 48 tokens of 3 or 4 texts, the longest 17 to 32. The first two are to be
# recorded; of the others one has an empty text, one is a text short.
LENGTHS = ([21, 7, 1, 13], [18, 9, 4, 17], [20, 0, 15, 8], [21, 14, 6])

# What a model counts that has seen one size.
FIRST = {"the first batch of its size": 1}


@pytest.fixture(params=["frozen", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend to patch with, and a recorder for it."""
    if request.param == "gpu":
        return "triton"
    frozen_recorder.install(monkeypatch)
    return "reference"


def call_of(model: nn.Module, lengths: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """A right-padded batch as a tokenizer gives it."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, zoo.VOCAB, mask.shape, generator=generator)
    pad = getattr(model.config, "pad_token_id", 0) or 0
    call = {"input_ids": torch.where(mask == 1, ids, pad), "attention_mask": mask}
    if getattr(model.config, "type_vocab_size", 0) == 2:
        call["token_type_ids"] = torch.randint(0, 2, mask.shape, generator=generator) * mask
    return {name: tensor.to(DEVICE) for name, tensor in call.items()}


def graphs_of(model: nn.Module) -> tuple[int, int, dict[str, int]]:
    """Recorded, replayed, and calls without by reason."""
    report = encoder_fast.report(model)
    graphs = report.encoders[0].graphs
    assert graphs is not None
    assert report.fast_calls == graphs.replayed + sum(graphs.without.values())
    return graphs.recorded, graphs.replayed, graphs.without


@torch.inference_mode()
def expect_parity(model: nn.Module, plain: nn.Module, call: dict[str, Tensor]) -> None:
    """``model`` is as near to float64 as the rule wants it; ``plain`` is its unpatched twin."""
    output, original = model(**call)[0], plain(**call)[0]
    exact = copy.deepcopy(plain).double()(**call)[0]
    mask = call["attention_mask"].bool()
    by_token = exact.shape[:2] == mask.shape and exact.dim() > 2
    row = compare("output", output, original, exact, mask if by_token else mask.any(dim=1))
    assert row.ok, row
    if by_token:
        assert not output[~mask].any()
