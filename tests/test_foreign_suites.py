"""The script that runs other projects' test suites reports what differs with patched models."""

from __future__ import annotations

from pathlib import Path

import pytest

FOREIGN = Path(__file__).parent / "foreign"

SUITE = """
import torch
from transformers import BertConfig, BertModel

MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def padded_state():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(BertConfig(vocab_size=20, **sizes)).eval()
    with torch.inference_mode():
        return model(torch.ones_like(MASK), MASK).last_hidden_state[0, 2]


def test_that_passes_both_ways():
    assert padded_state().shape == (16,)


def test_that_fails_both_ways():
    assert False


def test_of_padding():
    assert padded_state().any()


def test_of_padding_that_is_known():
    assert padded_state().any()
"""


@pytest.mark.slow
def test_a_test_that_passes_only_unpatched_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOREIGN))
    import run

    # It asks for none, and they take seconds.
    monkeypatch.setattr(run.stand_ins, "make", lambda hub, sentences: None)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_other.py").write_text(SUITE)
    known = tmp_path / "known.toml"
    known.write_text('[[peft]]\ntest = "*_that_is_known"\nreason = "padding is zeros"\n')
    command = ["peft", str(tmp_path), "--only", "other", "--jobs", "0"]

    assert run.main([*command, "--known", str(known)]) == 1

    told = capfd.readouterr().out
    assert "DIFFERS: tests/test_other.py::test_of_padding\n  passed, patched failed\n" in told
    assert "known: tests/test_other.py::test_of_padding_that_is_known\n" in told
    assert "passed, patched failed: padding is zeros" in told
    assert "both_ways\n  " not in told
    assert "unpatched: 4 tests, 3 passed, 1 failed" in told
    assert "patched: 4 tests, 1 passed, 3 failed" in told
    assert "fast: 3 of 3 calls (100%)" in told
    assert "1 known differences, 1 others" in told
