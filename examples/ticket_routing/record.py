"""A run's figures as JSON: what was run, where, from which commit, and every figure."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import encoder_fast
from examples.ticket_routing.arrivals import Latencies
from examples.ticket_routing.errors import TicketError
from examples.ticket_routing.stream import Measured


def place() -> dict[str, Any]:
    """What a record says of the run, the machine and the versions."""
    info = encoder_fast.info()
    return {
        "command": command(sys.argv[1:]),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": info.devices[0] if info.devices else _processor(),
        "threads": info.cpu,
        "versions": info.versions,
        "platform": info.platform,
        "gpus": info.devices,
    }


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all.

    Raises:
        TicketError: it can't be written there.
    """
    unfinished = path.with_name(path.name + ".part")
    try:
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(path)
    except OSError as error:
        raise TicketError(f"--out {path}: {error.strerror}") from None


def points(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The measurements of one system, each latency included, in milliseconds."""
    return [
        {
            "rate": one.rate,
            "tickets": len(one.latencies.seconds),
            "failed": one.latencies.failed,
            "seconds": one.latencies.duration,
            "throughput": one.latencies.throughput,
            "batches": one.batches,
            "ms": {f"p{percent}": _ms(one, percent) for percent in (50, 95, 99)},
            "latencies_ms": [round(second * 1e3, 2) for second in one.latencies.seconds],
        }
        for one in measured
    ]


def read_points(path: Path, same: Mapping[str, Any]) -> dict[str, list[Measured]]:
    """The measurements that an earlier run has recorded, of each system.

    Args:
        same: what that run must have in common with this one, by the record's keys.

    Raises:
        TicketError: no such record, or one of something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        different = [key for key, value in same.items() if found[key] != value]
        earlier = {name: list(map(_measured, of_one)) for name, of_one in found["points"].items()}
    except OSError as error:
        raise TicketError(f"--add {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TicketError(f"--add {path}: not a record of this program") from None
    if different:
        raise TicketError(f"--add {path}: not the same {', '.join(different)}")
    return earlier


def _measured(point: Mapping[str, Any]) -> Measured:
    seconds = tuple(value / 1e3 for value in point["latencies_ms"])
    latencies = Latencies(seconds, point["failed"], point["seconds"])
    return Measured(point["rate"], latencies, point["batches"], ())


def verdict(found: Any) -> dict[str, Any]:
    """A :class:`~examples.ticket_routing.learn.Verdict` as plain data."""
    return asdict(found)


def command(arguments: Sequence[str]) -> str:
    """The command line, of paths their last part alone: a record is for others to read."""
    words = (Path(word).name if Path(word).is_absolute() else word for word in arguments)
    return shlex.join(["python", "-m", "examples.ticket_routing", *words])


def _ms(one: Measured, percent: float) -> float | None:
    """JSON has no infinity: ``None`` where so many tickets failed."""
    value = one.latencies.percentile(percent) * 1e3
    return round(value, 2) if value < float("inf") else None


def _commit() -> str:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
    return described.stdout.strip()


def _processor() -> str:
    """The processor's name as Linux has it; elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
