"""Folders of tiny models with settings of their own, as sentence-transformers writes them."""

import json
from pathlib import Path

import torch
import transformers
from berts import config

HOME = "sentence_transformers.models"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + c for c in LETTERS)]
Files = dict[str, object]


def save(folder: Path, head: str = "BertModel", **files: object) -> str:
    """A tiny model with a tokenizer of letters; ``a__b`` names the file ``a/b.json``."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 64, "num_labels": 1}
    model = getattr(transformers, head)(config(initializer_range=0.5, **sizes))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    put(folder, tokenizer_config={"tokenizer_class": "BertTokenizer", "model_max_length": 60})
    return put(folder, **files)


def put(folder: Path, **files: object) -> str:
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def modules(*kinds: str) -> list[Files]:
    return [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"{HOME}.{kind}"}
        for i, kind in enumerate(kinds)
    ]


def sentence_model(folder: Path, whole: object = None, **transformer: object) -> str:
    return save(
        folder,
        modules=modules("Transformer", "Pooling"),
        config_sentence_transformers=whole or {},
        sentence_bert_config=transformer,
        **{"1_Pooling__config": {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True}},
    )


def cross_model(folder: Path, **whole: object) -> str:
    return save(
        folder,
        "BertForSequenceClassification",
        modules=modules("Transformer"),
        config_sentence_transformers={"model_type": "CrossEncoder", **whole},
        sentence_bert_config={
            "transformer_task": "sequence-classification",
            "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
            "module_output_name": "scores",
        },
    )
