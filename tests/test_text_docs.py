"""docs/text.md tells the truth: its snippets run in order and print what is shown."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import transformers
from berts import minilm_path, tiny

PAGE = (Path(__file__).parents[1] / "docs" / "text.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(python|text)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)

# Models with these heads come in no package: small random ones stand for them.
HEADS = {
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": (
        "BertForSequenceClassification",
        2,
    ),
    "dslim/bert-base-NER": ("BertForTokenClassification", 9),
    "cross-encoder/ms-marco-MiniLM-L6-v2": ("BertForSequenceClassification", 1),
}


def test_snippets_run_and_print_what_is_shown(tmp_path_factory: pytest.TempPathFactory) -> None:
    paths = {"sentence-transformers/all-MiniLM-L6-v2": minilm_path()}
    for name, (head, labels) in HEADS.items():
        path = tmp_path_factory.mktemp("model")
        tiny(head, vocab_size=30522, num_labels=labels).save_pretrained(path)
        transformers.AutoTokenizer.from_pretrained(minilm_path()).save_pretrained(path)
        paths[name] = str(path)
    namespace: dict[str, object] = {}
    printed = ""
    for kind, text in BLOCKS:
        if kind == "text":
            assert printed == text
            continue
        for name, path in paths.items():
            text = text.replace(f'"{name}"', repr(path))
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(text, "docs/text.md", "exec"), namespace)
        printed = output.getvalue()
    assert all(f'"{name}"' in PAGE for name in paths)
