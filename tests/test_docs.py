"""The pages of docs/ tell the truth: their snippets run in order and print what is shown.

``python`` blocks run in one namespace a page, in an empty folder; the commands of ``console``
blocks run there too. A ``text`` block is what the python block before it printed.
"""

import contextlib
import io
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from berts import minilm_path, tiny

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(python|text|console)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = {path.name: BLOCK.findall(path.read_text("utf-8")) for path in sorted(DOCS.glob("*.md"))}
RUNNABLE = [name for name, blocks in PAGES.items() if any(kind == "python" for kind, _ in blocks)]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"

# Models with these heads come in no package: small random ones stand for them.
HEADS = {
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": (
        "BertForSequenceClassification",
        2,
    ),
    "dslim/bert-base-NER": ("BertForTokenClassification", 9),
    "cross-encoder/ms-marco-MiniLM-L6-v2": ("BertForSequenceClassification", 1),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folder that stands for each model that the pages name."""
    found = {MINILM: minilm_path()}
    for name, (head, labels) in HEADS.items():
        path = tmp_path_factory.mktemp("model")
        tiny(head, vocab_size=30522, num_labels=labels).save_pretrained(path)
        transformers.AutoTokenizer.from_pretrained(minilm_path()).save_pretrained(path)
        found[name] = str(path)
    return found


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", RUNNABLE)
def test_snippets_run_and_print_what_is_shown(
    page: str, paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "docs"}
    printed = ""
    for kind, text in PAGES[page]:
        if kind == "text":
            assert printed == text
            continue
        for name, path in paths.items():
            text = text.replace(name, path)
        if kind == "console":
            for line in text.splitlines():
                run(line, monkeypatch)
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(text, f"docs/{page}", "exec"), namespace)
        printed = output.getvalue()


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line ``$ encoder-fast …``, in this process."""
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    from cli_runs import call

    dollar, program, *arguments = shlex.split(line)
    assert (dollar, program) == ("$", "encoder-fast")
    assert call(monkeypatch, *arguments) == 0, line


def test_every_task_has_a_page() -> None:
    assert {
        "embeddings.md",
        "long-documents.md",
        "classify-and-tag.md",
        "rerank.md",
        "command-line.md",
        "patching.md",
        "text.md",
    } <= set(RUNNABLE)


def test_every_command_is_described() -> None:
    typer = pytest.importorskip("typer")
    from encoder_fast.cli import app

    page = (DOCS / "command-line.md").read_text("utf-8")
    for command in typer.main.get_command(app).commands:
        assert f"`{command}`" in page, command


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page: str) -> None:
    text = (DOCS / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (DOCS / target).exists(), target
