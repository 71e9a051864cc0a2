"""The models under test: real sizes, seeded random weights.

Speed does not depend on what the weights are, so nothing has to be downloaded. On a CPU the larger
ones run with fewer layers, which is in their name and in the record: all layers are alike, and the
speed of one is what is compared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bench.contestant import Unavailable
from bench.machine import Machine
from bench.roofs import dtype_name
from bench.workloads import Workload

_BASE = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
}
_LARGE = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
}
_ROBERTA_LIKE = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}


@dataclass(frozen=True, slots=True)
class Size:
    """An architecture at the size of a published model.

    Attributes:
        config_class: its class in transformers.
        settings: for its config, of the published one.
        layers_key: what its config calls the number of layers.
        layers, cpu_layers: of the published model, and of the one that a CPU runs.
        first_id: token ids below it are special ones, that a random text does not hold.
    """

    name: str
    config_class: str
    settings: dict[str, Any]
    layers: int
    cpu_layers: int
    layers_key: str = "num_hidden_layers"
    first_id: int = 1000

    @property
    def sdpa(self) -> bool:
        """Whether this version of transformers has SDPA for it."""
        model_class = transformers.MODEL_MAPPING[getattr(transformers, self.config_class)]
        return bool(model_class._supports_sdpa)


SIZES = {
    size.name: size
    for size in (
        Size(
            "MiniLM-L6",
            "BertConfig",
            {
                **_BASE,
                "hidden_size": 384,
                "intermediate_size": 1536,
                "num_hidden_layers": 6,
            },
            layers=6,
            cpu_layers=6,
        ),
        Size("BERT-base", "BertConfig", _BASE, layers=12, cpu_layers=4),
        Size("BERT-large", "BertConfig", _LARGE, layers=24, cpu_layers=2),
        Size("DistilBERT", "DistilBertConfig", {}, layers=6, cpu_layers=3, layers_key="n_layers"),
        Size("RoBERTa-base", "RobertaConfig", {**_BASE, **_ROBERTA_LIKE}, layers=12, cpu_layers=3),
        Size(
            "MPNet-base",
            "MPNetConfig",
            {**_BASE, "vocab_size": 30527, "max_position_embeddings": 514},
            layers=12,
            cpu_layers=3,
        ),
        Size(
            "DeBERTa-v3-base",
            "DebertaV2Config",
            {
                **_BASE,
                "vocab_size": 128100,
                "relative_attention": True,
                "position_buckets": 256,
                "norm_rel_ebd": "layer_norm",
                "share_att_key": True,
                "pos_att_type": ["p2c", "c2p"],
                "position_biased_input": False,
                "max_relative_positions": -1,
                "layer_norm_eps": 1e-7,
                "type_vocab_size": 0,
                "max_position_embeddings": 512,
            },
            layers=12,
            cpu_layers=3,
        ),
        Size(
            "ModernBERT-base",
            "ModernBertConfig",
            {"num_hidden_layers": 22, "reference_compile": False},
            layers=22,
            cpu_layers=4,
        ),
        Size(
            "ELECTRA-base",
            "ElectraConfig",
            {**_BASE, "embedding_size": 768},
            layers=12,
            cpu_layers=3,
        ),
        Size(
            "ALBERT-base",
            "AlbertConfig",
            {**_BASE, "embedding_size": 128, "vocab_size": 30000},
            layers=12,
            cpu_layers=3,
        ),
        Size(
            "DeBERTa-base",
            "DebertaConfig",
            {
                **_BASE,
                "vocab_size": 50265,
                "relative_attention": True,
                "pos_att_type": ["c2p", "p2c"],
                "position_biased_input": False,
                "max_relative_positions": -1,
                "layer_norm_eps": 1e-7,
                "type_vocab_size": 0,
            },
            layers=12,
            cpu_layers=3,
        ),
        # RoBERTa's layers, under classes of their own; with RoBERTa's words, for more take no time.
        Size(
            "XLM-RoBERTa-base",
            "XLMRobertaConfig",
            {**_BASE, **_ROBERTA_LIKE},
            layers=12,
            cpu_layers=3,
        ),
        Size(
            "CamemBERT-base",
            "CamembertConfig",
            {**_BASE, **_ROBERTA_LIKE},
            layers=12,
            cpu_layers=3,
        ),
        # Its 250,880 words would take 2.6 GB for each contestant, and no time.
        Size(
            "XLM-RoBERTa-XL",
            "XLMRobertaXLConfig",
            {
                "hidden_size": 2560,
                "num_attention_heads": 32,
                "intermediate_size": 10240,
                "vocab_size": 30522,
                "max_position_embeddings": 514,
                "type_vocab_size": 1,
            },
            layers=36,
            cpu_layers=1,
        ),
    )
}

# Sizes of a model that Triton's interpreter gets through in a second.
_TINY = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "vocab_size": 1200,
}


@dataclass(frozen=True, slots=True)
class ModelCase:
    """One model on one batch in one dtype.

    Attributes:
        compiled: torch.compile's modes that take part; each takes half a minute to compile.
        exported: peers that run an exported graph take part.
    """

    size: Size
    workload: Workload
    dtype: torch.dtype
    compiled: tuple[str, ...] = ()
    exported: bool = False

    def layers(self, machine: Machine) -> int:
        return {"cpu": self.size.cpu_layers, "gpu": self.size.layers, "fake": 1}[machine.kind]

    def title(self, machine: Machine) -> str:
        layers = self.layers(machine)
        cut = "" if layers == self.size.layers else f" ({layers} of {self.size.layers} layers)"
        return self.size.name + cut

    def name(self, machine: Machine) -> str:
        return f"{self.title(machine)} {self.workload.name} {dtype_name(self.dtype)}"

    def facts(self, machine: Machine) -> dict[str, Any]:
        return {
            "model": self.size.name,
            "layers": self.layers(machine),
            "all_layers": self.size.layers,
            "dtype": dtype_name(self.dtype),
            "workload": self.workload.name,
            "kind": self.workload.kind,
            "batch": self.workload.batch,
            "longest": self.workload.longest,
            "tokens": self.workload.tokens,
            "padding": round(self.workload.padding, 3),
        }


def config_of(case: ModelCase, machine: Machine) -> Any:
    size = case.size
    config_class = getattr(transformers, size.config_class, None)
    if config_class is None:
        raise Unavailable(f"this transformers has no {size.config_class}")
    settings = {**size.settings, size.layers_key: case.layers(machine)}
    if machine.is_fake:
        settings |= _tiny(size)
    return config_class(**settings)


def _tiny(size: Size) -> dict[str, Any]:
    if size.config_class == "DistilBertConfig":
        return {"dim": 32, "n_heads": 2, "hidden_dim": 64, "n_layers": 1, "vocab_size": 1200}
    if size.config_class == "ModernBertConfig":
        # its special tokens are the last of the real vocabulary
        special = ("pad", "bos", "eos", "cls", "sep")
        return {**_TINY, **{f"{name}_token_id": i for i, name in enumerate(special)}}
    return dict(_TINY)


def build(case: ModelCase, machine: Machine, attention: str | None = None) -> Any:
    """A model of its own in eval mode; every call for one case gives the same weights.

    Args:
        attention: transformers' name of an implementation, ``None`` for eager.
    """
    torch.manual_seed(0)
    config = copy.deepcopy(config_of(case, machine))
    with torch.device(machine.device):
        model = transformers.AutoModel.from_config(config, attn_implementation=attention or "eager")
        spread_vectors(model)
    return model.eval().to(machine.device, case.dtype)


def spread_vectors(model: nn.Module) -> None:
    """Move biases off 0 and norms off 1: where transformers starts them, a lost one goes unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def inputs_of(case: ModelCase, machine: Machine, seed: int = 0) -> dict[str, Tensor]:
    """A padded batch of random tokens, as a tokenizer would give it."""
    chance = torch.Generator().manual_seed(seed)
    config = config_of(case, machine)
    workload = case.workload
    shape = workload.batch, workload.longest
    ids = torch.randint(case.size.first_id, config.vocab_size - 10, shape, generator=chance)
    lengths = torch.tensor(workload.lengths)
    mask = torch.arange(workload.longest) < lengths[:, None]
    padding = getattr(config, "pad_token_id", None) or 0
    ids = torch.where(mask, ids, torch.tensor(padding))
    return {
        "input_ids": ids.to(machine.device),
        "attention_mask": mask.long().to(machine.device),
    }
