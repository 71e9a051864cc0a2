"""A pytest plugin for runs on a GPU: it prints failures at once, and ends a worker that is broken.

After an illegal access or a failed assertion in a kernel, every CUDA call of the process fails. A
worker like that would fail its other tests in seconds, and by work stealing those of others too.
It ends instead, and pytest-xdist starts a new one.
"""

from __future__ import annotations

import os

import pytest
import torch


class Printer:
    """Prints a failure when it happens: a run that is stopped may not come to its summary."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.write_line(f"\n{report.nodeid}\n{report.longreprtext}")


class Guard:
    """Ends a process that can't use the GPU any more."""

    def __init__(self, is_worker: bool) -> None:
        self._is_worker = is_worker
        self._failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed = report.nodeid

    # Last, when the report was sent.
    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if nodeid != self._failed or not context_is_lost():
            return
        if self._is_worker:
            os._exit(1)
        pytest.exit("the CUDA context is lost", returncode=1)


def context_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    if not is_worker:
        terminal = config.pluginmanager.getplugin("terminalreporter")
        config.pluginmanager.register(Printer(terminal))
    # The process that gives tests to workers has no context, and needs none.
    if torch.cuda.is_available() and (is_worker or not config.getoption("numprocesses", None)):
        config.pluginmanager.register(Guard(is_worker))
