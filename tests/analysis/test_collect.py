"""One pass hands every reducer what the LLM and the SAE make of each token, once."""

import pytest
import torch
from subjects import make_subject, place

from sae_lightning.analysis import collect as room
from sae_lightning.analysis.collect import EncodedBatch, collect, excerpt
from sae_lightning.llm.capture import capture
from sae_lightning.llm.sites import Kind
from sae_lightning.stream.packing import Sequences


class Everything:
    """Keeps all batches; only a test may."""

    def __init__(self):
        self.batches: list[EncodedBatch] = []

    def add(self, batch: EncodedBatch) -> None:
        self.batches.append(batch)

    @property
    def features(self) -> torch.Tensor:
        """Strengths [sequences, context, 32]."""
        parts = []
        for batch in self.batches:
            strengths, units = batch.active_features
            parts.append(torch.zeros(*batch.keep.shape, 32).index_copy(2, units, strengths))
        return torch.cat(parts)

    def __getattr__(self, name: str) -> torch.Tensor:
        return torch.cat([getattr(batch, name) for batch in self.batches])


def collected(subject, source, tokens: int, batch: int = 4) -> Everything:
    everything = Everything()
    text, total = excerpt(source, tokens, batch)
    collect(subject, text, [everything], total=total)
    return everything


def test_features_are_those_of_the_activations_at_the_source(subject, words):
    found = collected(subject, words(600), 99)
    assert len(found.tokens) == 9  # windows of 11 tokens behind BOS
    x = capture(subject.llm.model, found.tokens, [subject.sites.source])[subject.sites.source]
    torch.testing.assert_close(found.x, x, rtol=1e-4, atol=1e-4)
    expected = subject.sae.encode(x.flatten(0, 1)).view(9, 12, 32)
    expected[:, 0] = 0  # BOS
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-4)
    assert found.sequence_indices.tolist() == list(range(9))
    assert (expected > 0).any()


def test_text_is_the_first_tokens_of_the_source_and_no_more(words):
    first, again = words(600), words(600)
    parts, total = excerpt(first, 100, 4)
    read = torch.cat([part.tokens for part in parts])
    assert total == len(read) == 10
    assert torch.equal(read, again.next(10).tokens)
    assert first.cursor == 10


def test_bos_padding_and_special_tokens_have_no_features(subject):
    tokens = torch.tensor([[0, 5, 1, 7, 8, 1], [0, 9, 9, 9, 1, 1]])
    text = torch.tensor([[False] + [True] * 5, [False] + [True] * 3 + [False] * 2])
    everything = Everything()
    batch = Sequences(tokens, text, torch.arange(2))
    collect(subject, [batch], [everything], total=2)
    kept = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0]]).bool()
    assert torch.equal(everything.keep, kept)
    assert (everything.features[~kept] == 0).all()
    special = place(subject.llm, subject.sae, subject.sites, keep_special=True)
    everything = Everything()
    collect(special, [batch], [everything], total=2)
    assert torch.equal(everything.keep, text)


def test_norms_above_the_limit_are_dropped_as_in_training(subject, words):
    found = collected(subject, words(600), 99)
    norms = found.x.norm(dim=2)[found.keep]
    limit = 1.1
    subject = place(subject.llm, subject.sae, subject.sites, max_norm=limit)
    strict = collected(subject, words(600), 99, batch=9)
    expected = norms <= limit * norms.median()
    assert 0 < expected.sum() < len(expected)
    assert torch.equal(strict.keep[found.keep], expected)
    assert (strict.features[~strict.keep] == 0).all()


def test_what_is_usual_is_told_by_the_first_sequences_as_in_training(subject, words):
    found = collected(subject, words(600), 99)
    norms = found.x.norm(dim=2)
    usual = norms[:2][found.keep[:2]].median()
    assert usual != norms[found.keep].median()
    subject = place(subject.llm, subject.sae, subject.sites, max_norm=1.1)
    strict = collected(subject, words(600), 99, batch=2)
    assert torch.equal(strict.keep, found.keep & (norms <= 1.1 * usual))


def test_slices_of_a_batch_add_up_to_it(subject, words, monkeypatch):
    whole = collected(subject, words(600), 99)
    monkeypatch.setattr(room, "MAX_STRENGTHS", 32 * 12)  # a sequence at a time
    sliced = collected(subject, words(600), 99)
    assert len(sliced.batches) == 9 > len(whole.batches)
    for name in ("tokens", "keep", "x", "y", "features", "sequence_indices"):
        torch.testing.assert_close(getattr(sliced, name), getattr(whole, name))


@pytest.mark.parametrize("target", [Kind.resid, Kind.mlp])
def test_a_transcoders_batch_holds_both_sites(tiny, words, target):
    subject = make_subject(tiny("llama"), Kind.mlp_in, target)
    found = collected(subject, words(600), 44)
    sites = [subject.sites.source, subject.sites.target]
    there = capture(subject.llm.model, found.tokens, sites)
    torch.testing.assert_close(found.x, there[sites[0]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.y, there[sites[1]], rtol=1e-4, atol=1e-4)


def test_a_text_shorter_than_what_is_asked_for_is_read_once(words, capsys):
    source = words(600)
    parts, total = excerpt(source, 10**6, 4)
    assert sum(len(part.tokens) for part in parts) == total == source.window_count
    assert source.epoch == 1
    assert "the text has fewer than 1,000,000 tokens: all of it is read" in capsys.readouterr().out
