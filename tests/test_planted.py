"""Every analysis finds a feature that was planted in a tiny LLM."""

import json
import random

import pyarrow.parquet
import pytest
from planted import FEATURE, READS, WRITES, save_planted, token
from tiny_llm import TEXT
from tiny_run import write_text

from sae_lightning.analysis.lens import lens
from sae_lightning.analysis.probing.labelled_text import read_labelled_text
from sae_lightning.analysis.probing.probes import probe
from sae_lightning.analysis.steer import steer
from sae_lightning.analysis.subject import open_subject
from sae_lightning.analysis.survey.survey import survey
from sae_lightning.llm.load import Dtype, LLMConfig
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.report.catalogue import BEFORE
from sae_lightning.report.parquet import write_catalogue
from sae_lightning.stream.local import LocalConfig


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """The planted SAE as a subject of analysis."""
    folder = tmp_path_factory.mktemp("planted")
    llm, sae = save_planted(folder)
    (folder / "text").mkdir()
    overrides = {
        "llm": LLMConfig(name=str(llm), dtype=Dtype.float32, device="cpu"),
        "data": LocalConfig(path=str(write_text(folder / "text")), context=16, held_out=0.34),
        "layer": LayerConfig(index=0),
        "seed": 0,
    }
    return open_subject(str(sae), overrides, ["llm", "data"])


@pytest.fixture(scope="module")
def found(subject):
    return survey(subject, subject.corpus.train, tokens=1500)


def test_its_examples_are_all_of_the_words_that_it_reads(found):
    peaks = found.features.top.tokens[FEATURE, :, BEFORE].tolist()
    assert len(peaks) == 12
    assert set(peaks) == {token(word) for word in READS}


def test_its_token_set_is_these_words_and_predicts_perfectly(found):
    token_sets = found.features.token_sets
    assert token_sets.score[FEATURE] == pytest.approx(1)
    assert {t for t in token_sets.tokens[FEATURE].tolist() if t >= 0} == {token(w) for w in READS}
    assert not token_sets.previous[FEATURE]


def test_the_lens_sees_what_it_reads_and_what_it_writes(subject):
    found = lens(subject, top=2)
    assert {*found.read_tokens[FEATURE].tolist()} == {token(word) for word in READS}
    assert found.effect.promoted[FEATURE, 0] == token(WRITES)
    assert found.effect.sharpness.argmax() == FEATURE


def test_steering_with_it_writes_the_word(subject):
    found = steer(subject, FEATURE, [-20, 20], "the lazy dog", tokens=8)
    weaker, stronger = found.steered
    assert found.unsteered.tokens.count(WRITES) <= 1
    assert WRITES not in weaker.tokens
    assert stronger.tokens[-8:] == [WRITES] * 8


def test_a_probe_on_one_unit_chooses_it(subject, tmp_path):
    rng = random.Random(0)
    plain = [word for word in TEXT.split() if f" {word}" not in READS]
    documents = []
    for i in range(160):
        words = rng.choices(plain, k=6)
        if i % 2:
            words.insert(rng.randrange(1, 6), rng.choice(READS).strip())
        documents.append({"text": " ".join(words), "magic": i % 2})
    file = tmp_path / "labelled.jsonl"
    file.write_text("\n".join(map(json.dumps, documents)))
    config = LocalConfig(path=str(file), context=16)
    text = read_labelled_text(config, "magic", subject.llm.tokenizer, tokens=160 * 15)
    found = probe(subject, text, k=(1, 2))
    assert found.find_score("features", 1).auroc == 1
    assert found.find_score("features", 1).accuracy == 1
    assert [match.unit for match in found.best_units["features"]] == [FEATURE, FEATURE]


def test_the_parquet_file_says_what_the_catalogue_says(found, tmp_path):
    for catalogue in (found.features, found.neurons):
        write_catalogue(tmp_path / "units.parquet", catalogue, {})
        rows = pyarrow.parquet.read_table(tmp_path / "units.parquet").to_pylist()
        assert len(rows) == catalogue.num_units
        assert [row[catalogue.kind] for row in rows] == list(range(len(rows)))
        assert [row["fired"] for row in rows] == catalogue.statistics.firing_counts.tolist()
        for unit in (0, FEATURE):
            for i, example in enumerate(rows[unit]["examples"]):
                shown = catalogue.top.tokens[unit, i]
                inside = shown >= 0
                assert example["strength"] == catalogue.top.peak_strength[unit, i]
                assert example["tokens"] == [catalogue.vocabulary[t] for t in shown[inside]]
                expected = catalogue.top.strengths[unit, i][inside].tolist()
                assert example["strengths"] == expected
    row = pyarrow.parquet.read_table(tmp_path / "units.parquet").to_pylist()[0]
    assert "score" not in row  # of neurons, which always fire


def test_a_row_of_the_planted_feature(found, tmp_path):
    write_catalogue(tmp_path / "features.parquet", found.features, {})
    row = pyarrow.parquet.read_table(tmp_path / "features.parquet").to_pylist()[FEATURE]
    assert sorted(row["tokens"]) == sorted(READS)
    assert row["score"] == pytest.approx(1)
    assert row["maximum"] == pytest.approx(2)  # an embedding of 3, less a bias of 1
    assert {e["tokens"][e["strengths"].index(max(e["strengths"]))] for e in row["examples"]} == {
        *READS
    }
    assert row["density"] == pytest.approx(row["fired"] / found.features.statistics.tokens)
