"""The table says what the catalogue says."""

import math

import pyarrow.parquet as parquet
import pytest
import torch

from sae_lightning.analysis.lens import measure_effects
from sae_lightning.analysis.survey.survey import survey
from sae_lightning.report.parquet import write_catalogue
from sae_lightning.report.parquet_reader import read_catalogue, read_header


@pytest.fixture
def features(subject, words):
    subject.sae.b_enc[5] = -1e6  # never fires
    found = survey(subject, words(3000), tokens=1500, examples=4).features
    return found._replace(effect=measure_effects(subject, None, top=3))


@pytest.fixture
def rows(features, tmp_path):
    write_catalogue(tmp_path / "features.parquet", features, {})
    return parquet.read_table(tmp_path / "features.parquet").to_pylist()


def test_a_row_holds_the_numbers_of_its_unit(features, rows):
    statistics = features.statistics
    assert [row["feature"] for row in rows] == list(range(32))
    for unit, row in enumerate(rows):
        assert row["fired"] == statistics.firing_counts[unit]
        assert row["density"] == pytest.approx(statistics.densities[unit].item())
        assert (row["mean"], row["maximum"]) == (statistics.mean[unit], statistics.maximum[unit])
        assert row["histogram"] == statistics.histogram[unit].tolist()
        assert sum(row["histogram"]) == row["fired"]
        score = features.token_sets.score[unit].item()
        assert row["score"] == (None if math.isnan(score) else score)
        assert row["neighbours"] == features.neighbours.units[unit].tolist()
        assert len(row["partners"]) == len(row["partner_likeness"])


def test_tokens_are_written_as_they_read_and_nothing_where_there_is_none(features, rows):
    read = features.vocabulary
    for unit, row in enumerate(rows):
        assert row["tokens"] == [read[i] for i in features.token_sets.tokens[unit] if i >= 0]
        examples = features.top
        assert len(row["examples"]) == (examples.peak_strength[unit] > 0).sum()
        for i, example in enumerate(row["examples"]):
            inside = examples.tokens[unit, i] >= 0
            assert example["tokens"] == [read[t] for t in examples.tokens[unit, i][inside]]
            assert example["strengths"] == examples.strengths[unit, i][inside].tolist()
            assert example["strength"] == examples.peak_strength[unit, i]
    silent = rows[5]
    assert (silent["score"], silent["tokens"], silent["partners"]) == (None, [], [])
    assert silent["examples"] == silent["examples_of_all_strengths"] == []
    assert not torch.tensor(silent["histogram"]).any()


@pytest.mark.parametrize("group", [8192, 5])
def test_a_catalogue_comes_back_from_its_file_as_it_was(features, tmp_path, group, monkeypatch):
    """But for places beyond the ends of sequences, of which nothing is written: they say 0."""
    monkeypatch.setattr("sae_lightning.report.parquet.UNITS_PER_GROUP", group)
    of = {"weights": "abc"}
    write_catalogue(tmp_path / "features.parquet", features, of)
    header = read_header(tmp_path / "features.parquet")
    assert header == (features.kind, 32, of, features.statistics.tokens)
    back = read_catalogue(tmp_path / "features.parquet", features.vocabulary)
    assert (back.kind, back.vocabulary) == (features.kind, features.vocabulary)
    for group in ("statistics", "top", "random", "token_sets", "neighbours", "partners", "effect"):
        given, found = getattr(features, group), getattr(back, group)
        assert given is None or list(given._fields) == list(found._fields)
        for name, value in given._asdict().items() if given else ():
            assert_same(value, getattr(found, name), f"{group}.{name}", features)
    assert torch.equal(back.linear_histogram, features.linear_histogram)
    assert torch.equal(features.linear_histogram.sum(dim=1), features.statistics.firing_counts)


def assert_same(given, found, name, features):
    if not isinstance(given, torch.Tensor):
        assert given == found, name
        return
    assert given.dtype == found.dtype, name
    if name in ("neighbours.similarity", "partners.similarity"):
        related = getattr(features, name.split(".")[0])
        given = given.masked_fill(related.units < 0, 0)
    if name.split(".")[0] in ("top", "random") and name.endswith("sequence"):
        given = given.masked_fill(getattr(features, name.split(".")[0]).peak_strength == 0, 0)
    width = found.shape[1] if found.ndim > 1 else 0  # as wide as the longest list
    given = given[:, :width] if width else given
    assert torch.equal(given.nan_to_num(-9), found.nan_to_num(-9)), name
