"""Long documents: windows that cover every word once, and what a search then finds."""

import itertools
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from berts import DEVICE, minilm_path
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from encoder_fast import TextEncoder
from encoder_fast.text.chunking import OVERLAP, Window, longest_first, truncated, windows
from encoder_fast.text.vectors import Chunks, whole_texts

LAST = (
    "As for the old lighthouse on the headland, its keeper retired long ago. He left the key of "
    "the lighthouse under the blue flowerpot beside its door, where it is still kept for whoever "
    "has to go in. Those who borrow the lighthouse key climb to the lamp, wind the clock, lock "
    "the lighthouse door again and put the key back under the flowerpot where it was hidden."
)
QUESTION = "Where is the lighthouse key kept?"


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.from_pretrained(minilm_path(), device=DEVICE)


def test_windows_cover_a_text_and_share_it_out() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.given(count=st.integers(0, 5000), size=st.integers(1, 600))
    def check_one(count: int, size: int) -> None:
        check_windows(count, size)

    check_one()


def check_windows(count: int, size: int) -> None:
    planned = windows(3, count, size)
    assert planned[0].start == planned[0].own_start == 0
    assert planned[-1].stop == planned[-1].own_stop == count
    for window in planned:
        assert window.text == 3
        assert window.stop - window.start == min(count, size)
        assert window.start <= window.own_start <= window.own_stop <= window.stop
    for one, following in itertools.pairwise(planned):
        assert one.own_stop == following.own_start
        # the middle of what they share
        assert 0 <= (one.stop - one.own_stop) - (one.own_stop - following.start) <= 1
        assert one.stop - following.start >= size // OVERLAP
    assert sum(window.weight for window in planned) == count


def test_truncation_keeps_the_side() -> None:
    assert truncated(0, 10, 4, "right") == Window(0, 0, 4, 0, 4)
    assert truncated(0, 10, 4, "left") == Window(0, 6, 10, 6, 10)
    assert truncated(0, 3, 4, "left") == Window(0, 0, 3, 0, 3)


def test_longest_first_as_tokenizers_does() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 50))
    def check_one(first: int, second: int, room: int) -> None:
        check_longest_first(first, second, room)

    check_one()


def check_longest_first(first: int, second: int, room: int) -> None:
    theirs = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    theirs.pre_tokenizer = WhitespaceSplit()
    theirs.enable_truncation(room, strategy="longest_first")
    ids = theirs.encode("a " * first, "b " * second).ids
    kept = longest_first(first, second, room)
    assert (ids.count(0), ids.count(1)) == (kept, min(second, room - kept))


def test_a_mean_counts_each_token_once() -> None:
    """The weighted mean of the windows' own tokens is the mean of all tokens."""
    tokens = torch.randn(1000, 5, dtype=torch.float64)
    planned = windows(0, 1000, 128)
    assert len(planned) > 5
    parts = [tokens[window.own_start : window.own_stop].mean(0) for window in planned]
    (mean,) = whole_texts(torch.stack(parts), planned, "mean")
    assert torch.allclose(mean, tokens.mean(0), rtol=0, atol=1e-15)
    parts = [tokens[window.start : window.stop].amax(0) for window in planned]
    (top,) = whole_texts(torch.stack(parts), planned, "max")
    assert torch.equal(top, tokens.amax(0))


def test_short_texts_among_long_ones_are_untouched(encoder: TextEncoder) -> None:
    texts = ["short", "word " * 700, "", "also short"]
    cut = encoder.encode([texts[0], texts[2], texts[3]])
    whole = encoder.encode(texts, long_text="chunk")
    assert np.allclose(whole[[0, 2, 3]], cut, atol=1e-5)
    assert np.allclose(np.linalg.norm(whole, axis=1), 1)


def test_the_vector_of_a_text_is_that_of_its_windows(encoder: TextEncoder) -> None:
    """Each window is encoded as the same words would be as a text of their own."""
    # one token a word, so that windows can be cut out by hand
    words = random.Random(0).choices(["red", "green", "blue", "tree", "house", "dog"], k=600)
    planned = windows(0, 600, 254)
    alone = [" ".join(words[window.start : window.stop]) for window in planned]
    vectors = torch.from_numpy(encoder.encode(alone, normalize=False)).double()
    weights = torch.tensor([window.weight for window in planned]).double() / 600
    expected = torch.nn.functional.normalize(weights @ vectors, dim=0)
    vector = encoder.encode(" ".join(words), long_text="chunk")
    assert np.allclose(vector, expected, atol=1e-6)


def test_each_window_has_the_prompt(encoder: TextEncoder) -> None:
    words = random.Random(0).choices(["red", "green", "blue", "tree", "house", "dog"], k=400)
    prompt = "query about colours: "
    room = 254 - len(encoder._pipeline.tokeniser.tokens([prompt])[0].ids)
    found = encoder.encode([" ".join(words)], prompt=prompt, long_text="chunk", return_chunks=True)
    planned = windows(0, 400, room)
    alone = [prompt + " ".join(words[window.start : window.stop]) for window in planned]
    assert np.allclose(found.vectors, encoder.encode(alone), atol=1e-5)
    assert found.start[0] == 0
    with pytest.raises(ValueError, match="leaves no room"):
        encoder.encode("a", prompt="word " * 300, long_text="chunk")


def document(words: int) -> list[str]:
    """Paragraphs about farming that say nothing of keys or lighthouses, some ``words`` in all."""
    rng = random.Random(1)
    who = ["The farmer", "A neighbour", "The cooperative", "My aunt", "The council"]
    does = ["planted", "sold", "watered", "measured", "praised", "forgot", "insured"]
    what = ["the barley", "two orchards", "the eastern field", "old tractors", "a herd of goats"]
    when = ["in spring", "before the rain", "after the market", "during a dry year", "at dawn"]
    paragraphs, count = [], 0
    while count < words:
        sentences = [
            f"{rng.choice(who)} {rng.choice(does)} {rng.choice(what)} {rng.choice(when)}."
            for _ in range(10)
        ]
        paragraphs.append(" ".join(sentences))
        count += len(paragraphs[-1].split())
    return paragraphs


@pytest.fixture(scope="module")
def library() -> list[str]:
    """A document of 5,000 words with a fact in its last paragraph, among short ones near it."""
    paragraphs = document(5000)
    assert len(" ".join(paragraphs).split()) >= 5000
    return [
        "Satellites guide ships along the coast at night.",
        "\n\n".join([*paragraphs, LAST]),
        "The locksmith in our street cuts keys while you wait.",
        "Blue flowerpots are on sale at the garden centre.",
    ]


def test_the_last_paragraph_is_found(encoder: TextEncoder, library: list[str]) -> None:
    found = encoder.encode(library, long_text="chunk", return_chunks=True)
    assert isinstance(found, Chunks)
    assert len(found) == len(found.vectors) > 20
    best = int(encoder.similarity(QUESTION, found.vectors)[0].argmax())
    passage = library[found.text[best]][found.start[best] : found.stop[best]]
    assert found.text[best] == 1 and LAST in passage
    with pytest.warns(UserWarning, match="1 of 4 texts"):
        cut = encoder.similarity(QUESTION, encoder.encode(library))[0]
    assert cut.argmax() != 1


def test_every_word_has_a_say(encoder: TextEncoder, library: list[str]) -> None:
    document = library[1]
    without = document.removesuffix(LAST)
    whole = encoder.encode([document, without], long_text="chunk")
    assert np.abs(whole[0] - whole[1]).max() > 1e-3
    with pytest.warns(UserWarning, match="2 of 2"):
        cut = encoder.encode([document, without])
    assert np.allclose(cut[0], cut[1], atol=1e-6)


def test_chunks_know_where_they_are_from(encoder: TextEncoder, library: list[str]) -> None:
    found = encoder.encode(iter(library), long_text="chunk", return_chunks=True)
    assert found.text.tolist() == sorted(found.text.tolist())
    assert set(found.text.tolist()) == set(range(len(library)))
    for index, text in enumerate(library):
        mine = found.text == index
        assert found.start[mine][0] == 0 and found.stop[mine][-1] == len(text)
        # neighbours overlap
        assert (found.start[mine][1:] < found.stop[mine][:-1]).all()
    nothing = encoder.encode([], long_text="chunk", return_chunks=True)
    assert nothing.vectors.shape == (0, 384) and len(nothing) == 0


def _lee() -> tuple[list[str], np.ndarray]:
    """Lee's 50 documents and how alike people found each two of them."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("ENCODER_FAST_TEST_WHEELS", root / ".cache" / "wheels"))
    wheels = sorted(folder.glob("gensim-*.whl"))
    if not wheels:
        pytest.skip(f"no gensim wheel in {folder}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        texts = wheel.read("gensim/test/test_data/lee.cor").decode("latin-1").splitlines()
        table = wheel.read("gensim/test/test_data/similarities0-1.txt").decode().splitlines()
    return texts, np.array([[float(cell) for cell in row.split()] for row in table])


def test_agreement_with_people(encoder: TextEncoder) -> None:
    texts, people = _lee()
    pairs = np.triu_indices(len(texts), 1)
    assert len(texts) == 50 and len(pairs[0]) == 1225
    table = encoder.similarity(texts, texts)
    assert np.corrcoef(table[pairs], people[pairs])[0, 1] == pytest.approx(0.656, abs=0.002)
