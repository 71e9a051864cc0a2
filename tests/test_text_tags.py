"""Entities are those of the text, whatever its tokenizer and its label scheme are."""

import itertools

import numpy as np
import pytest
import torch
import transformers
from berts import tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from encoder_fast import TextEncoder
from encoder_fast.text.labels import OUTSIDE, read_labels
from encoder_fast.text.tag import STRATEGIES, Entity, entities
from encoder_fast.text.tokenising import Row, Tokeniser, Tokens

# Each text as stretches, one word or sign each, with the class of those that are an entity's.
# A class goes on until the next stretch has another.
Stretches = list[tuple[str, str]]


def stretches(*parts: str) -> Stretches:
    """``"PER:Ada"`` is part of an entity, anything without a colon is not."""
    return [tuple(part.split(":", 1)) if ":" in part else ("", part) for part in parts]  # type: ignore[misc]


SPACED = {
    "spaces": stretches("PER:Anna", " ", "PER:Lovelace", " ", "lives", " ", "in", " ", "LOC:Paris"),
    "a full stop": stretches("Anna", " ", "left", " ", "LOC:Paris", ".", " ", "PER:Ada", "?"),
    "signs around": stretches("(", "LOC:Paris", ",", "“", "LOC:Köln", "”", "/", "LOC:Rome", ")"),
    "hyphen, apostrophe": stretches("LOC:Paris", "-", "based", " ", "PER:Ada", "'", "s"),
    "two spaces": stretches("PER:Ada", "  ", "PER:Lovelace", "  ", "left", " "),
    "spaces around": stretches("  ", "PER:Ada", "  ", "left", "  "),
    "lines": stretches("PER:Ada", "\n", "left", "\t", "LOC:Paris", "\n"),
    "marks": stretches("cafe\u0301", " ", "in", " ", "LOC:Sa\u0303o", " ", "LOC:दिल्ली"),
    "digits": stretches("an", " ", "MISC:A380", " ", "left", " ", "LOC:Paris"),
    "emoji": stretches("👩‍🚀", "PER:Ada", "👍🏽", " ", "LOC:Paris", "🎉"),
}  # fmt: skip
UNSPACED = {
    "Chinese": stretches("今天", "LOC:北京", "天气", "怎么样", "。"),
    "Chinese from the start": stretches("PER:李明", "说", "、", "我", "住在", "LOC:上海"),
    "Japanese": stretches("私は", "LOC:東京タワー", "で", "PER:アダ", "に", "会った", "。"),
    "Thai": stretches("ฉันอยู่ที่", "LOC:กรุงเทพ", "กับ", "PER:เอดา"),
    "Korean": stretches("PER:안나", "는", " ", "LOC:서울", "에서", " ", "산다"),
    "mixed": stretches("我用", "MISC:iPhone15", "在", "LOC:Paris", "打电话"),
}


def text_of(parts: Stretches) -> str:
    return "".join(part for _, part in parts)


CHARACTERS = sorted(
    set("".join(map(text_of, [*SPACED.values(), *UNSPACED.values()]))) - set(" \n\t")
)
PIECES = ["An", "na", "Pa", "ris", "Love", "lace", "lives", "in", "left", "Köln", "北京", "天气"]
WORDS = ["Anna", "Paris", "Lovelace", "Ada", "lives", "left", "in", "Rome", "based"]


def wordpiece() -> Tokenizer:
    pieces = [*PIECES, *CHARACTERS]
    vocabulary = ["[UNK]", *pieces, *("##" + piece for piece in pieces)]
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def byte_level(*, prefix: bool = False, trim: bool = True) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.post_processor = processors.ByteLevel(add_prefix_space=prefix, trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    return made


def unigram() -> Tokenizer:
    pieces = [*PIECES, *("▁" + piece for piece in (*PIECES, "A", "p", "R")), "▁", "\n", "\t", " "]
    vocabulary = [("<unk>", 0.0), *((piece, len(piece) - 9.0) for piece in pieces)]
    vocabulary += [(c, -12.0) for c in CHARACTERS if c not in pieces]
    return Tokenizer(models.Unigram(vocabulary, unk_id=0))


def metaspace(*before: object, scheme: str = "always", split: bool = True) -> Tokenizer:
    made = unigram()
    end = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    made.pre_tokenizer = pre_tokenizers.Sequence([*before, end])
    return made


def not_split() -> Tokenizer:
    """Gemma's way: spaces replaced, nothing split, bytes for what it has no token for."""
    merges = [("A", "n"), ("n", "a"), ("P", "a"), ("▁", "Pa"), ("i", "s"), ("北", "京")]
    merges += [("▁", letter) for letter in "AKLilr"]
    singles = ["▁", "北", "京", *(c for c in CHARACTERS if c.isascii())]
    pieces = [*singles, *map("".join, merges), *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", *pieces])}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return made


TOKENIZERS = {
    "WordPiece": wordpiece,
    "byte-level BPE": byte_level,
    "byte-level BPE with a space in front": lambda: byte_level(prefix=True, trim=False),
    "Metaspace": metaspace,
    "Metaspace, not split": lambda: metaspace(scheme="first", split=False),
    "XLM-R": lambda: metaspace(pre_tokenizers.WhitespaceSplit()),
    "DeBERTa-v3": lambda: metaspace(pre_tokenizers.Punctuation()),
    "Gemma": not_split,
    "no pre-tokenizer": unigram,
}


def wrapped(inner: Tokenizer) -> transformers.PreTrainedTokenizerFast:
    inner.add_special_tokens(["[CLS]", "[SEP]", "[PAD]"])
    ends = [(name, inner.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    around = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    kept = inner.post_processor
    inner.post_processor = around if kept is None else processors.Sequence([kept, around])
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    for unknown in ("[UNK]", "<unk>"):
        if inner.token_to_id(unknown) is not None:
            names["unk_token"] = unknown
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=48, **names
    )


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> transformers.PreTrainedTokenizerFast:
    made = wrapped(TOKENIZERS[request.param]())
    return made


def expected(parts: Stretches) -> list[tuple[str, str, int]]:
    """The entities of a text: class, text, place."""
    found: list[tuple[str, int, int]] = []
    place = 0
    open_class = ""
    for label, part in parts:
        if label and label == open_class:
            found[-1] = (label, found[-1][1], place + len(part))
        elif label:
            found.append((label, place, place + len(part)))
        if label or not part.isspace():
            open_class = label
        place += len(part)
    text = text_of(parts)
    return [(label, text[start:stop], start) for label, start, stop in found]


def seen(found: list[Entity], text: str) -> list[tuple[str, str, int]]:
    for one in found:
        assert one.text == text[one.start : one.stop] == one.text.strip() != ""
    return [(one.label, one.text, one.start) for one in found]


def certain(names: list[str], labels: list[str]) -> np.ndarray:
    """Probabilities that leave no doubt."""
    return np.eye(len(names), dtype=np.float32)[[names.index(label) for label in labels]]


CLASSES = ["PER", "LOC", "MISC"]
BIO = ["O", *(f"{place}-{name}" for name in CLASSES for place in "BI")]


def tokens_of(tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> Tokens:
    return Tokeniser(tokenizer).tokens([text], detail=True)[0]


def covering(tokens: Tokens, text: str, start: int, stop: int) -> list[int]:
    """The tokens of ``start:stop``, without those of spaces alone."""
    assert tokens.offsets is not None
    spans = enumerate(tokens.offsets.tolist())
    return [i for i, (a, b) in spans if text[max(a, start) : min(b, stop)].strip()]


def labelled(tokens: Tokens, parts: Stretches, places: str = "BIII") -> list[str]:
    """A label for each token, by the letters for an entity's first, inner, last and only one."""
    labels = ["O"] * len(tokens.ids)
    first, inner, last, only = places
    for name, covered, start in expected(parts):
        numbers = covering(tokens, text_of(parts), start, start + len(covered))
        for number in numbers:
            labels[number] = f"{inner}-{name}"
        labels[numbers[-1]] = f"{last}-{name}"
        labels[numbers[0]] = f"{first if len(numbers) > 1 else only}-{name}"
    return labels


def read(
    tokenizer: transformers.PreTrainedTokenizerFast,
    text: str,
    labels: list[str],
    names: list[str] = BIO,
) -> list[tuple[str, str, int]]:
    """The entities that labels of a text's tokens mean."""
    tokeniser = Tokeniser(tokenizer)
    probabilities = np.eye(len(names), dtype=np.float32)[[names.index(label) for label in labels]]
    (tokens,) = tokeniser.tokens([text], detail=True)
    spaces = tokeniser.space_ids
    found = entities(text, tokens, probabilities, read_labels(names), "first", spaces)
    return seen(found, text)


@pytest.mark.parametrize("name", [*SPACED, *UNSPACED])
def test_entities_are_those_of_the_text(
    tokenizer: transformers.PreTrainedTokenizerFast, name: str
) -> None:
    parts = {**SPACED, **UNSPACED}[name]
    text = text_of(parts)
    tokens = tokens_of(tokenizer, text)
    assert read(tokenizer, text, labelled(tokens, parts, "BIII")) == expected(parts)
    bioes = ["O", *(f"{place}-{name}" for name in CLASSES for place in "BIES")]
    assert read(tokenizer, text, labelled(tokens, parts, "BIES"), bioes) == expected(parts)


@pytest.mark.parametrize("name", SPACED)
def test_the_first_token_speaks_for_its_word(
    tokenizer: transformers.PreTrainedTokenizerFast, name: str
) -> None:
    """Many models are trained by a word's first token alone, and its others say anything."""
    parts = SPACED[name]
    text = text_of(parts)
    tokens = tokens_of(tokenizer, text)
    labels = labelled(tokens, parts)
    spaces = Tokeniser(tokenizer).space_ids
    place = misled = 0
    for _, part in parts:
        inside = covering(tokens, text, place, place + len(part))
        inside = [i for i in inside if tokens.ids[i] not in spaces]
        for number in inside[1:]:
            labels[number] = "O" if labels[number].endswith("MISC") else "B-MISC"
        misled += len(inside) > 1
        place += len(part)
    assert misled > 0
    assert read(tokenizer, text, labels) == expected(parts)


@pytest.mark.parametrize("kind", ["XLM-R", "Metaspace"])
def test_a_space_before_a_word_lends_it_its_label(kind: str) -> None:
    """A word's first token may be the space alone: what a model was trained to label."""
    tokenizer = wrapped(TOKENIZERS[kind]())
    text = "于 李明 说"
    tokens = tokens_of(tokenizer, text)
    assert tokenizer.convert_ids_to_tokens(tokens.ids.tolist()).count("▁") == 3
    for said in (["O", "O", "B-PER", "O", "O", "O"], ["O", "O", "O", "B-PER", "O", "O"]):
        labels = [*said[:4], *["I-PER"] * (len(tokens.ids) - 6), *said[4:]]
        assert read(tokenizer, text, labels) == [("PER", "李明", 2)]


def test_a_space_behind_the_text() -> None:
    """Byte-level BPE gives it an empty place at the end."""
    tokenizer = wrapped(byte_level())
    labels = ["B-PER"] * len(tokens_of(tokenizer, "Ada  ").ids)
    assert read(tokenizer, "Ada  ", labels)[-1][:2] == ("PER", "Ada")


def test_bytes_of_one_stretch_are_one_word() -> None:
    """Unigram with bytes gives all bytes of an unknown stretch the offsets of all of it."""
    text = "北京。"
    tokens = Tokens(np.arange(7), np.array([[0, 2]] * 6 + [[2, 3]]))
    probabilities = np.eye(3, dtype=np.float32)[[1, 1, 2, 0, 1, 2, 0]]
    labels = read_labels(["O", "B-LOC", "I-LOC"])
    found = entities(text, tokens, probabilities, labels, "first", np.zeros(0, np.int64))
    assert seen(found, text) == [("LOC", "北京", 0)]


def tagger(tokenizer: transformers.PreTrainedTokenizerFast, names: list[str]) -> TextEncoder:
    """A tiny random model, for inputs of 48 tokens."""
    numbers = {name: number for number, name in enumerate(names)}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 48}
    labels = {"id2label": dict(enumerate(names)), "label2id": numbers}
    model = tiny("BertForTokenClassification", seed=3, **sizes, **labels)
    with torch.no_grad():  # so that each token says something else
        model.bert.embeddings.word_embeddings.weight.mul_(50)
    return TextEncoder.from_pretrained(model, tokenizer)


SIGNS = [
    "Anna left Paris.",
    "(Köln), Rome/Paris: Ada!",
    "今天北京天气怎么样。 Ada",
    "Ada  Anna 👩‍🚀",
]


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_are_those_of_transformers(
    tokenizer: transformers.PreTrainedTokenizerFast, strategy: str
) -> None:
    """Where they agree on what a word is: by WordPiece's vocabulary, and from space to space."""
    ours = tagger(tokenizer, BIO)
    words = ["Anna", "Lovelace", "lives", "Annaris", "Ada", "Parisin", "Rome", "inlives"]
    texts = [
        " ".join(some) for some in itertools.islice(itertools.permutations(words, 6), 0, 4000, 300)
    ]
    if strategy in ("none", "simple") or "##in" in tokenizer.get_vocab():
        texts += SIGNS
    else:  # for transformers a token that is a space is a word
        inside = [set(tokenizer.tokenize(text)) for text in texts]
        texts = [text for text, of in zip(texts, inside, strict=True) if not of & {"▁", "Ġ", " "}]
    pipe = transformers.pipeline(
        "token-classification", ours.model, tokenizer=tokenizer, aggregation_strategy=strategy
    )
    found = ours.tag(texts, aggregation_strategy=strategy)
    compared = 0
    for text, mine in zip(texts, found, strict=True):
        theirs = [
            (one.get("entity_group", one.get("entity")), covered.strip(), one["score"])
            for one in pipe(text)
            if (covered := text[one["start"] : one["end"]]).strip()
        ]
        assert [(e.label, e.text) for e in mine] == [one[:2] for one in theirs]
        scores = [one[2] for one in theirs]
        assert [e.probability for e in mine] == pytest.approx(scores, abs=1e-5)
        seen(mine, text)
        compared += len(mine)
    assert compared > 10 or not texts


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_windows_neither_lose_nor_double(
    tokenizer: transformers.PreTrainedTokenizerFast,
    strategy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if the model had read all of the text at once, wherever windows begin and end."""
    ours = tagger(tokenizer, BIO)
    weights = torch.randn(len(tokenizer), len(BIO), generator=torch.manual_seed(0)) * 3

    def scores(rows: list[Row]) -> list[torch.Tensor]:
        return [weights[torch.from_numpy(row.ids)] for row in rows]

    monkeypatch.setattr(ours._runner, "token_scores", scores)
    text = " ".join([*map(text_of, SPACED.values()), *map(text_of, UNSPACED.values())] * 2)
    tokeniser = Tokeniser(tokenizer)
    (tokens,) = tokeniser.tokens([text], detail=True)
    assert len(tokens.ids) > 5 * 48
    probabilities = torch.softmax(weights[torch.from_numpy(tokens.ids)], dim=-1).numpy()
    whole = entities(text, tokens, probabilities, read_labels(BIO), strategy, tokeniser.space_ids)
    assert ours.tag(text, aggregation_strategy=strategy) == whole
    assert len(whole) > 40


SCHEMES = {
    # names: the class of each, with the letter of its place before a colon
    "IO": ("O PER LOC", "O PER LOC"),
    "IO, with its letter": ("O I-PER I-LOC", "O I:PER I:LOC"),
    "BIO": ("O B-PER I-PER B-LOC I-LOC", "O B:PER I:PER B:LOC I:LOC"),
    "BIO, a class of one token": ("O B-PER I-PER B-AGE", "O B:PER I:PER B:AGE"),
    "BIO and a bare class": ("O B-PER I-PER ORG", "O B:PER I:PER ORG"),
    "BIOES": ("O B-A I-A E-A S-A S-B", "O B:A I:A E:A S:A S:B"),
    "BIOES without an inside": ("O B-A E-A S-B", "O B:A E:A S:B"),
    "BILOU": ("O B-A I-A L-A U-A U-B", "O B:A I:A L:A U:A U:B"),
    "BMES": ("O B-A M-A E-A S-A", "O B:A M:A E:A S:A"),
    "BMEWO": ("O B-A M-A E-A W-A W-B", "O B:A M:A E:A W:A W:B"),
    "words": ("O BEGIN-PER INSIDE-PER BEGIN-LOC", "O B:PER I:PER B:LOC"),
    "dots": ("O B.PER I.PER I.LOC", "O B:PER I:PER I:LOC"),
    "colons": ("O B:PER I:PER", "O B:PER I:PER"),
    "addresses": ("O END-DATE LAST-NAME UNIT", "O END-DATE LAST-NAME UNIT"),
    "behind": ("O PER-B PER-I LOC-B", "O B:PER I:PER B:LOC"),
    "behind, BIOES": ("O A-B A-I A-E A-S C-S", "O B:A I:A E:A S:A S:C"),
    "underscores": ("O B_FIRST_NAME I_FIRST_NAME", "O B:FIRST_NAME I:FIRST_NAME"),
    "small letters": ("o b-per i-per", "O B:per I:per"),
    "hyphens in classes": ("O B-E-MAIL I-E-MAIL B-X-B", "O B:E-MAIL I:E-MAIL B:X-B"),
    "hyphens, behind": ("O B-CELL-B B-CELL-I T-CELL-B", "O B:B-CELL I:B-CELL B:T-CELL"),
    "letters alone": ("O B I", "O B: I:"),
    "O by another name": ("OUTSIDE B-PER I-PER", "O B:PER I:PER"),
    "O by any name": ("nix B-PER I-PER", "O B:PER I:PER"),
    "O by another name, no places": ("no_entity PER LOC", "O PER LOC"),
    "O by any name, a class of one token": ("nix B-A I-A B-C", "O B:A I:A B:C"),
    "a place on both sides": ("O I-CELL-B I-CELL-I", "O B:I-CELL I:I-CELL"),
    "a letter": ("O B", "O B"),
    "fillers": ("O X [CLS] I-PER I-LOC", "O O O I:PER I:LOC"),
    "O by another name, a filler": ("other <pad> B-PER I-PER", "O O B:PER I:PER"),
    "no O": ("B-PER I-PER B-LOC", "B:PER I:PER B:LOC"),
    "parts of speech": ("NOUN VERB X PUNCT", "NOUN VERB X PUNCT"),
    "no names": ("LABEL_0 LABEL_1", "LABEL_0 LABEL_1"),
    # names that look like a scheme's
    "E-mail": ("O E-MAIL PHONE", "O E-MAIL PHONE"),
    "E-mail alone": ("O E-MAIL", "O E-MAIL"),
    "E-mail in BIO": ("O B-PER I-PER E-MAIL", "O B:PER I:PER E-MAIL"),
    "U-boat in BIO": ("O B-PER I-PER U-BOAT", "O B:PER I:PER U-BOAT"),
    "cells": ("O B-CELL T-CELL", "O B-CELL T-CELL"),
    "cells, no O": ("B-CELL T-CELL", "B-CELL T-CELL"),
    "cells in BIO": ("O B-DNA I-DNA B-CELL T-CELL", "O B:DNA I:DNA B-CELL T-CELL"),
    "vitamins": ("O VITAMIN-B VITAMIN-E", "O VITAMIN-B VITAMIN-E"),
    "hepatitis": ("O HEPATITIS-B INFLUENZA-B", "O HEPATITIS-B INFLUENZA-B"),
    "forms": ("O I-94 W-2 S-1", "O I-94 W-2 S-1"),
    "letters of grades": ("A B C D E", "A B C D E"),
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_label_schemes(scheme: str) -> None:
    names, meant = (text.split(" ") for text in SCHEMES[scheme])
    for order in itertools.islice(itertools.permutations(range(len(names))), 40):
        labels = read_labels([names[i] for i in order])
        for place, i in enumerate(order):
            letter, _, name = meant[i].rpartition(":")
            number = labels.class_of[place]
            assert ("O" if number == OUTSIDE else labels.classes[number]) == name
            assert labels.begins[place] == (letter in ("B", "S", "U", "W"))
            assert labels.ends[place] == (letter in ("E", "L", "S", "U", "W"))


SEQUENCES = {
    # labels of words a b c …, and the entities' words
    "IO": ("PER PER O PER LOC", "PER:ab PER:d LOC:e"),
    "IOB1": ("I-PER B-PER I-PER I-LOC", "PER:a PER:bc LOC:d"),
    "IOB2": ("B-PER I-PER B-PER O I-LOC", "PER:ab PER:c LOC:e"),
    "IOE": ("I-PER E-PER I-PER I-LOC", "PER:ab PER:c LOC:d"),
    "BIOES": ("B-PER I-PER E-PER I-PER S-PER S-PER O", "PER:abc PER:d PER:e PER:f"),
    "BILOU": ("B-PER L-PER U-LOC U-LOC L-LOC", "PER:ab LOC:c LOC:d LOC:e"),
    "behind": ("PER-B PER-I PER-B O LOC-I", "PER:ab PER:c LOC:e"),
    "letters alone": ("B I O B B", ":ab :d :e"),
}


@pytest.mark.parametrize("scheme", SEQUENCES)
def test_where_entities_begin_and_end(scheme: str) -> None:
    labels, meant = (text.split(" ") for text in SEQUENCES[scheme])
    text = " ".join("abcdefg"[: len(labels)])
    names = sorted({"O", "LOC-B", *labels} if scheme == "behind" else {"O", *labels})
    places = np.arange(0, len(text), 2)
    tokens = Tokens(places, np.stack([places, places + 1], axis=1))
    probabilities = np.eye(len(names), dtype=np.float32)[[names.index(one) for one in labels]]
    nothing = np.zeros(0, np.int64)
    found = entities(text, tokens, probabilities, read_labels(names), "first", nothing)
    assert [f"{e.label}:{e.text.replace(' ', '')}" for e in found] == meant


def test_a_strategy_that_does_not_exist() -> None:
    ours = tagger(wrapped(wordpiece()), BIO)
    for call in (ours.tag, ours.tag_stream):
        with pytest.raises(
            ValueError, match=r"aggregation_strategy must be one of .*'max'.*'mean'"
        ):
            call(["Ada"], aggregation_strategy="mean")
    for strategy in STRATEGIES:
        assert ours.tag(["", " \n"], aggregation_strategy=strategy) == [[], []]
