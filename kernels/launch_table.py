"""Launch configurations that were measured on a card, for the launchers to look up.

`launch_table.json` holds them as {card: {kernel: {shape class: configuration}}}. The card is named
as its driver names it; a kernel's file says what its shape classes are and which fields its
configurations have. `python -m bench tune` measures and writes them, once and offline: nothing is
ever searched for on a user's call.

A card that is not in the table, or a shape class that is not, takes the ladder in the kernel's own
file. Those are safe everywhere: chosen from compiled code for registers and shared memory, with a
smaller one where a card has less of the latter.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("launch_table.json")

Config = dict[str, Any]

# What a search tries, by (kernel, shape class); empty but for `python -m bench tune`.
_forced: dict[tuple[str, str], Config] = {}


def tuned(kernel: str, shape_class: str, device: torch.device) -> Config | None:
    """The measured configuration of a kernel for a shape class; None where there is none."""
    if _forced:
        forced = _forced.get((kernel, shape_class))
        if forced is not None:
            return forced
    if device.type != "cuda":
        return None
    return load().get(_card(device), {}).get(kernel, {}).get(shape_class)


@contextmanager
def forced(kernel: str, shape_class: str, config: Config) -> Iterator[None]:
    """Within the block, launches of this kernel and shape class take `config`."""
    key = kernel, shape_class
    before = _forced.get(key)
    _forced[key] = config
    try:
        yield
    finally:
        if before is None:
            del _forced[key]
        else:
            _forced[key] = before


@functools.cache
def load() -> dict[str, dict[str, dict[str, Config]]]:
    """The table as it stands on disk, read once."""
    return json.loads(TABLE.read_text("utf-8"))


@functools.cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
