"""A tiny random model of every family, and all the heads that each has."""

import pytest
import torch
import transformers
from berts import DEVICE
from torch import nn

VOCAB = 97
PAD = 1  # RoBERTa's, so that positions start at 2

_BERT_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 72,
    "max_position_embeddings": 40,
}
_ROBERTA = {**_BERT_SIZES, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}

# family: (config class, sizes, prefix of its classes, heads)
_TOKEN_AND_TEXT = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
FAMILIES = {
    "bert": ("BertConfig", _BERT_SIZES, "Bert", (*_TOKEN_AND_TEXT, "ForPreTraining")),
    "roberta": ("RobertaConfig", _ROBERTA, "Roberta", _TOKEN_AND_TEXT),
    "xlm_roberta": ("XLMRobertaConfig", _ROBERTA, "XLMRoberta", _TOKEN_AND_TEXT),
    "xlm_roberta_xl": ("XLMRobertaXLConfig", _ROBERTA, "XLMRobertaXL", _TOKEN_AND_TEXT),
    "camembert": ("CamembertConfig", _ROBERTA, "Camembert", _TOKEN_AND_TEXT),
    "distilbert": (
        "DistilBertConfig",
        {
            "vocab_size": VOCAB,
            "dim": 48,
            "n_layers": 2,
            "n_heads": 3,
            "hidden_dim": 72,
            "max_position_embeddings": 40,
        },
        "DistilBert",
        _TOKEN_AND_TEXT,
    ),
    "electra": (
        "ElectraConfig",
        {**_BERT_SIZES, "embedding_size": 24},  # narrower, as in the small ones: a projection
        "Electra",
        (*_TOKEN_AND_TEXT, "ForPreTraining"),
    ),
    "modernbert": (
        "ModernBertConfig",
        {
            **_ROBERTA,
            "cls_token_id": 0,
            "sep_token_id": 2,
            "num_hidden_layers": 4,
            "global_attn_every_n_layers": 3,  # layers 0 and 3 see everything
            "local_attention": 8,  # so that the window is far shorter than the sequences
            "max_position_embeddings": 64,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
        "ModernBert",
        _TOKEN_AND_TEXT,
    ),
    "mpnet": ("MPNetConfig", _ROBERTA, "MPNet", _TOKEN_AND_TEXT),
    "albert": (
        "AlbertConfig",
        {**_BERT_SIZES, "embedding_size": 24, "num_hidden_layers": 3, "num_hidden_groups": 2},
        "Albert",
        (*_TOKEN_AND_TEXT, "ForPreTraining"),
    ),
    # as the published ones: no absolute positions, spans shorter than the sequences of the tests
    "deberta": (
        "DebertaConfig",
        {
            **_BERT_SIZES,
            "relative_attention": True,
            "max_relative_positions": 12,
            "pos_att_type": ["c2p", "p2c"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
        "Deberta",
        [head for head in _TOKEN_AND_TEXT if head != "ForMultipleChoice"],
    ),
    "deberta_v2": (
        "DebertaV2Config",
        {
            **_BERT_SIZES,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["c2p", "p2c"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
        "DebertaV2",
        _TOKEN_AND_TEXT,
    ),
}

DEBERTAS = ("deberta", "deberta_v2")

# Their positions go by the ids.
ROBERTAS = ("roberta", "xlm_roberta", "xlm_roberta_xl", "camembert", "mpnet")

# Their attention goes by the distance of columns, which packing shortens across a hole.
BY_DISTANCE = ("modernbert", "mpnet", *DEBERTAS)

# They have no table of positions that could end.
WITHOUT_LIMIT = ("modernbert", *DEBERTAS)

CASES = [(family, head) for family, (*_, heads) in FAMILIES.items() for head in heads]


def build(family: str, head: str = "Model", seed: int = 0, **changes: object) -> nn.Module:
    """A tiny random model in eval mode, its weights large enough for errors to show."""
    config_class, sizes, prefix, _ = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**sizes, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, prefix + head)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embeddings" not in name:
                parameter.mul_(5)
    return model.to(DEVICE)


def refuses_left_padding(family: str, head: str) -> bool:
    """Whether a pooler or head reads column 0 and the attention over it is not plain softmax."""
    if (family, head) == ("modernbert", "ForMultipleChoice"):
        return False  # it looks for the first real token
    pools = head in ("ForSequenceClassification", "ForMultipleChoice")
    return family in BY_DISTANCE and (pools or (family, head) == ("mpnet", "Model"))


def sizes_for(backend: str, family: str, dtype: torch.dtype) -> dict[str, int]:
    """Changes of a tiny model that let a backend run it; a skipped test where none do."""
    if not backend.startswith("cuda"):
        return {}
    if dtype == torch.float32 or family in ("modernbert", "mpnet"):
        pytest.skip(f"backend {backend!r} has no such attention")
    # 3 heads of 32, for it has none of 16
    return {"dim" if family == "distilbert" else "hidden_size": 96}
