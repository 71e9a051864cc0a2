"""The architectures that have a fast path: one short file each.

A family says which model classes it reads and turns a live model into an
:class:`~encoder_fast.spec.EncoderSpec`. To add one, write its file and list it in ``FAMILIES``.
"""

from __future__ import annotations

from torch import nn

from encoder_fast.errors import UnsupportedModelError
from encoder_fast.families import (
    albert,
    bert,
    deberta,
    deberta_v2,
    distilbert,
    electra,
    modernbert,
    mpnet,
    roberta,
    xlm_roberta_xl,
)
from encoder_fast.families.family import Family

__all__ = ["FAMILIES", "Family", "find_family", "supported_classes", "unsupported"]

FAMILIES: tuple[Family, ...] = (
    bert.FAMILY,
    *roberta.FAMILIES,
    xlm_roberta_xl.FAMILY,
    distilbert.FAMILY,
    electra.FAMILY,
    albert.FAMILY,
    modernbert.FAMILY,
    mpnet.FAMILY,
    deberta.FAMILY,
    deberta_v2.FAMILY,
)


def supported_classes() -> list[str]:
    """The names of the model classes that can be patched, heads left aside."""
    return sorted(name for family in FAMILIES for name in family.class_names)


def find_family(cls: type[nn.Module]) -> Family | None:
    """The family that reads models of class ``cls``, or ``None``."""
    for family in FAMILIES:
        if family.matches(cls):
            return family
    return None


def unsupported(model: nn.Module) -> UnsupportedModelError:
    """The error for a model that holds no encoder of any family."""
    return UnsupportedModelError(
        f"{type(model).__name__} holds no encoder that encoder_fast can run. Supported: "
        f"{', '.join(supported_classes())}, bare or inside a model with a head. "
        "Nothing was changed."
    )
