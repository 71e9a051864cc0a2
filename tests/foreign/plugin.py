"""A pytest plugin: patches the models of a foreign suite and writes its tests' outcomes down.

A model is patched as a user would: as a whole, before it is first called. So the plugin replaces
``Module.__call__`` and looks at what is called from outside any other module. Without ``--patched``
PyTorch is left alone.
"""

from __future__ import annotations

import json
import random
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import encoder_fast
from encoder_fast.families import find_family
from encoder_fast.patching.locate import original_class
from encoder_fast.patching.reporting import Counts

FAST = "fast"

_met: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_calls: Counter[str] = Counter()
"""Of the encoders in the test that runs: :data:`FAST`, or the reason why not."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--patched", action="store_true")
    parser.addoption("--outcomes", help="a file that gets a line of JSON for each report of a test")


def pytest_configure(config: pytest.Config) -> None:
    # A worker of pytest-xdist sends its reports to the process that started it.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(Path(config.getoption("--outcomes"))))
    if config.getoption("--patched"):
        _patch_what_is_called()
        _count_calls()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Many foreign tests draw random weights without a seed; both runs are to draw the same."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    report = yield
    if report.when == "teardown":
        report.user_properties.append(("calls", dict(_calls)))
        _calls.clear()
    return report


class _Writer:
    """Appends each report at once, so that a run that is broken off leaves what it saw."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        calls = dict(report.user_properties).get("calls", {})
        self._write(report.nodeid, report.outcome, calls)

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self._write(report.nodeid, report.outcome, {})

    def _write(self, test: str, outcome: str, calls: dict[str, int]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, "outcome": outcome, "calls": calls}) + "\n")


def _patch_what_is_called() -> None:
    original: Any = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        _patch(self)
        # A patched model notices what stands in its place, and falls back.
        nn.Module.__call__ = original  # type: ignore[method-assign]
        try:
            return original(self, *args, **kwargs)
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]

    nn.Module.__call__ = call  # type: ignore[method-assign]


def _patch(root: nn.Module) -> None:
    # A part that is called by itself may have been patched with the whole.
    if root in _met or original_class(root) is not type(root):
        return
    if any(find_family(original_class(module)) for module in root.modules()):
        _met.add(root)
        try:
            encoder_fast.patch(root)
        except encoder_fast.UnsupportedModelError as error:
            _calls[f"patch refused: {error}"] += 1


def _count_calls() -> None:
    count_fast, count_fallback = Counts.count_fast, Counts.count_fallback

    def fast(self: Counts) -> None:
        _calls[FAST] += 1
        count_fast(self)

    def fallback(self: Counts, reason: str) -> None:
        _calls[reason] += 1
        count_fallback(self, reason)

    Counts.count_fast = fast  # type: ignore[method-assign]
    Counts.count_fallback = fallback  # type: ignore[method-assign]
