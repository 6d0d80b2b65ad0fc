"""A share of the text is held out, in whole documents if possible."""

import numpy as np
import pytest
from datasets import Dataset

from sae_lightning.stream.documents import HOLD_OUT_SEED, hold_out

WORDS = "the quick brown fox jumps over the lazy dog "


def split(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    parts = hold_out(Dataset.from_dict({"text": texts}), share)
    return list(parts.train["text"]), list(parts.held_out["text"])


def book(size: int, mark: str = "") -> str:
    return (mark + WORDS * (size // len(WORDS) + 1))[:size]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.34, 0.5])
@pytest.mark.parametrize("documents", [5, 40, 1000])
def test_of_many_similar_documents_so_many_are_held_out_at_fixed_places(documents, share):
    texts = [book(900 + i % 200, f"{i} ") for i in range(documents)]
    train, held_out = split(texts, share)
    n = min(max(1, round(share * documents)), documents - 1)
    if n <= 4 * share * documents:
        places = np.random.default_rng(HOLD_OUT_SEED).permutation(documents)[:n]
        assert held_out == [texts[i] for i in sorted(places)]
        assert train == [text for text in texts if text not in held_out]


CORPORA = {
    "a book and a note": [book(100_000), "the fox"],
    "a note and a book": ["the fox", book(100_000)],
    "three books": [book(100_000, mark) for mark in "abc"],
    "a library and notes": [*(book(50, f"{i} ") for i in range(300)), book(200_000)],
    "two books and an empty file": [book(80_000, "a"), "", book(90_000, "b")],
    "one line under a title": ["Title\n" + book(50_000)],
    "no spaces": ["x" * 10_000, "y"],
    "other letters": ["я" * 30_000, "note", "私は" * 30_000],
}


@pytest.mark.parametrize("share", [0.02, 0.05, 0.3, 0.6])
@pytest.mark.parametrize("texts", CORPORA.values(), ids=CORPORA)
def test_of_documents_that_differ_the_share_is_one_of_the_text(texts, share):
    train, held_out = split(texts, share)
    held, total = (len("".join(part).encode()) for part in (held_out, texts))
    assert share / 2 <= held / total <= min(4 * share, (1 + share) / 2)
    whole = [text for text in texts if text in train or text in held_out]
    assert len(whole) >= len(texts) - 1, "one document is cut at most"
    for text in set(texts) - set(whole):
        begin, end = train[-1], held_out[-1]
        assert begin + end == text, "its last words are held out"
        assert begin.endswith((" ", "\n")) or " " not in text
    assert sorted("".join([*train, *held_out])) == sorted("".join(texts)), "nothing is lost"


def test_a_library_is_not_cut_for_the_notes_beside_it():
    texts = [*(book(50, f"{i} ") for i in range(300)), *(book(2000, f"b{i} ") for i in range(100))]
    train, held_out = split(texts, 0.1)
    assert sorted(train + held_out) == sorted(texts)


def test_a_single_document_is_cut_where_it_always_was():
    text = "\n".join(" ".join(f"word{i}" for i in range(j, j + 7)) for j in range(500))
    for share in (0.05, 0.1, 0.3, 0.34, 0.7):
        (begin,), (end,) = split([text], share)
        assert begin + end == text
        assert len(begin) == text.rfind("\n", 0, int(len(text) * (1 - share))) + 1


@pytest.mark.parametrize("texts", [["", ""], ["", "", None]])
def test_empty_documents_are_no_reason_to_fail(texts):
    train, held_out = split(texts, 0.5)
    assert len(train) + len(held_out) == len(texts)
