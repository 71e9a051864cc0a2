"""A run's figures as JSON: what was run, where, from which commit, and every single time."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoder_fast.cli.parts import replace_file

if TYPE_CHECKING:
    from encoder_fast.cli.demo_run import DemoResult


def write_record(path: Path, result: DemoResult) -> None:
    """Write the demo's figures to ``path``, whole or not at all.

    Raises:
        OSError: it can't be written there.
    """
    place = result.place
    record: dict[str, Any] = {
        "command": _command(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": place.processor,
        "threads": place.info.cpu,
        "versions": place.info.versions,
        "platform": place.info.platform,
        "gpus": place.info.devices,
        "model": place.model,
        "backend": place.backend,
        "parity": [
            {"dtype": str(report.dtype), "rows": [asdict(row) for row in report.rows]}
            for report in result.parity
        ],
        "batches": [
            {
                "name": batch.name,
                "lengths": batch.lengths,
                "real_tokens": batch.tokens,
                "baseline": batch.baseline,
                "seconds": {timing.label: timing.seconds for timing in batch.timings},
                "median_seconds": {timing.label: timing.median for timing in batch.timings},
                "spread_p20_p80": {timing.label: timing.spread for timing in batch.timings},
            }
            for batch in result.batches
        ],
    }
    replace_file(path, (json.dumps(record, indent=1) + "\n").encode())


def _command() -> str:
    """The command line, of paths their last part alone: a record is for others to read."""
    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv)
    return shlex.join(words)


def commit() -> str:
    """The commit of the tree that the package runs from, with a mark where it was changed."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
    return described.stdout.strip()
