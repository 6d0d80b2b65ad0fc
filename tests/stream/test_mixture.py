"""Mixtures of texts: shares of the tokens at every point, exact resume, held-out parts of each."""

import numpy as np
import pytest
import torch
from small_text import byte_tokenizer

from sae_lightning import UserError
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import Kind, Site
from sae_lightning.stream import make_source, open_text
from sae_lightning.stream.local import LocalConfig
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.states import expect_rows
from sae_lightning.stream.tokens import open_tokens

CONTEXT = 6
WEIGHTS = {"a": 0.6, "b/*.txt": 0.3, "c": 0.1}


@pytest.fixture
def corpus(tmp_path):
    """Documents of one letter each; the text of the smallest share is the largest."""
    for name, documents, letters in (("a", 12, 40), ("b", 30, 20), ("c", 50, 100)):
        (tmp_path / name).mkdir()
        for number in range(documents):
            (tmp_path / name / f"{number}.txt").write_text(name * letters)
    (tmp_path / "b" / "unread.md").write_text("x" * 100)
    return tmp_path


def open_mixture(path, weights=WEIGHTS, **settings):
    config = LocalConfig(path=str(path), weights=weights, held_out=0.2, context=CONTEXT, **settings)
    return open_tokens(open_text(config), byte_tokenizer(), context=CONTEXT, seed=3)


def read_letters(sequences) -> list[str]:
    """The letter of each sequence."""
    decode = byte_tokenizer().decode
    texts = [decode(row, skip_special_tokens=True) for row in sequences]
    assert all(len(set(text)) <= 1 for text in texts), "texts are not joined in a sequence"
    return [text[:1] for text in texts]


@pytest.mark.parametrize("weights", [WEIGHTS, {"a": 6, "b/*.txt": 3, "c": 1}, {"c": 1.0}])
def test_each_text_has_its_share_of_the_tokens_at_every_point(corpus, weights):
    letters = np.array(read_letters(open_mixture(corpus, weights).train.next(400).tokens))
    total, served = sum(weights.values()), np.arange(1, 401)
    for name, weight in weights.items():
        had = np.cumsum(letters == name[0])
        assert np.abs(had - weight / total * served).max() < len(weights)


def test_a_mixture_does_not_depend_on_how_it_is_served_and_resumes_exactly(corpus):
    whole, parts = open_mixture(corpus).train, open_mixture(corpus).train
    expected = whole.next(500)
    assert whole.epoch == 1 and whole.texts[0].epoch > 3, "each text has epochs of its own"
    assert expected.sequence_ids.tolist() == list(range(500))
    served = [parts.next(n) for n in (1, 99, 131)]
    state = parts.state_dict()
    resumed = open_mixture(corpus).train
    resumed.load_state_dict(state)
    served.append(resumed.next(269))
    for field in range(3):
        assert torch.equal(torch.cat([part[field] for part in served]), expected[field])
    (corpus / "b" / "0.txt").write_text("d" * 20)
    with pytest.raises(UserError, match=r"^data: the text is no longer the one"):
        open_mixture(corpus).train.load_state_dict(state)


def test_a_part_of_each_text_is_held_out_by_its_share(corpus):
    opened = open_mixture(corpus)
    letters = read_letters(opened.held_out.pick_sequences(20))
    assert [letters.count(name) for name in "abc"] == [12, 6, 2]
    (corpus / "c").joinpath("only.txt").write_text("c" * 8)
    with pytest.raises(UserError, match=r"^data\.weights: .*only\.txt holds out less than a seq"):
        open_mixture(corpus, {"a": 1, "c/only.txt": 1}).held_out.pick_sequences(20)


def test_a_state_has_to_be_possible(corpus, llm):
    rows = LLMRows(llm, open_mixture(corpus).train, [Site(0, Kind.resid)], batch=4)
    for _ in range(3):
        rows.read_sequences()
    state, sizes = rows.state_dict(), {"batch": 4, "context": CONTEXT, "vocabulary": 300}
    assert expect_rows(state, rows.sites, **sizes) == 12
    state["tokens"]["texts"][0]["cursor"] += 1
    with pytest.raises(ValueError, match="the text's position"):
        expect_rows(state, rows.sites, **sizes)


def test_weights_that_cannot_be_are_refused(corpus):
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"^data\.weights: a:.*; give a positive share"):
            LocalConfig(path="x", weights={"a": weight})
    # what one text holds out, the other would train on
    with pytest.raises(UserError, match=r"^data\.weights: .*b/1\.txt is in both b/\*\.txt and b/1"):
        open_mixture(corpus, {"b/*.txt": 1, "a": 1, "b/1.txt": 1})
    with pytest.raises(UserError, match=r"^data\.path=.*nowhere: no file there"):
        open_mixture(corpus, {"a": 1, "nowhere": 1})
    mixture = LocalConfig(path=str(corpus), weights={"a": 1, "nowhere": 1})
    source = make_source(LLMConfig(name="smollm2"), mixture, seed=0)
    with pytest.raises(UserError, match=r"^data\.path=.*nowhere: no file there"):
        source.check_before_loading(source.read_shape(), resumed=False)  # before the LLM is loaded
