"""k-sparse probes find what tells two classes of texts apart, and only on texts held out."""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from planted import READS, save_planted
from pyarrow import csv
from scipy.sparse import csr_array
from subjects import make_subject
from tiny_llm import TEXT

from sae_lightning.analysis.benchmarks import benchmark_objective, probing_benchmark, probing_sets
from sae_lightning.analysis.benchmarks.benchmark_result import BenchmarkResult
from sae_lightning.analysis.benchmarks.benchmark_task import BENCHMARKS, BenchmarkTask
from sae_lightning.analysis.benchmarks.last_tokens import read_last_tokens
from sae_lightning.analysis.benchmarks.probing_benchmark_sections import compare_with_features
from sae_lightning.analysis.benchmarks.probing_scores import ProbingScores
from sae_lightning.analysis.benchmarks.probing_sets import LabelledSet, find_set_files, read_sets
from sae_lightning.analysis.benchmarks.sparse_probes import (
    choose_units,
    measure_differences,
    project_on_random_directions,
    reduce_to_row_space,
    score_probe,
    score_sparse,
    split_texts,
)
from sae_lightning.errors import UserError
from sae_lightning.files import write_json
from sae_lightning.llm.capture import capture
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.runs.folders import METRICS_FILE
from sae_lightning.runs.jobs import Job
from sae_lightning.runs.search import BENCHMARK_OBJECTIVES, SweepConfig, compute_objective
from sae_lightning.sae.controls import Control
from sae_lightning.stream.plays import PlaysConfig
from sae_lightning.stream.synthetic import SyntheticConfig

TEXTS = 300
LABELS = np.tile([0, 1], TEXTS // 2)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write_set(folder: Path, name: str, texts: list[str], labels: list) -> None:
    folder.mkdir(exist_ok=True)
    table = pa.table({"prompt": texts, "target": labels})
    with pa.CompressedOutputStream(str(folder / f"{name}.csv.zst"), "zstd") as file:
        csv.write_csv(table, file)


def make_task(run: Path, **settings) -> BenchmarkTask:
    base = {"llm": LLMConfig(name="x"), "data": PlaysConfig(), "layer": LayerConfig(index=0)}
    return BenchmarkTask(run=str(run), task="benchmark", **base, **settings)


def test_one_unit_has_the_auroc_that_its_rates_give():
    """Active on a share p of one class and q of the other, it has an AUROC of 1/2 + (p - q) / 2."""
    x = np.abs(noise(TEXTS, 6)) * 0.01
    pair = np.arange(TEXTS) // 2
    x[:, 4] = np.where(LABELS == 1, pair % 5 < 4, pair % 5 < 1)  # p = 0.8, q = 0.2
    split = split_texts(TEXTS, 0)
    tested = x[split.test, 4], LABELS[split.test]
    p, q = (tested[0][tested[1] == c].mean() for c in (1, 0))
    assert choose_units(x[split.train], LABELS[split.train], 1).tolist() == [4]
    assert score_sparse(x, LABELS, split, (1,)) == [pytest.approx(0.5 + (p - q) / 2)]
    sparse = csr_array(np.where(x > 0.5, x, 0))
    assert score_sparse(sparse, LABELS, split, (1,)) == [pytest.approx(0.5 + (p - q) / 2)]


def test_units_are_compared_on_the_scale_of_their_own_strength():
    """Class means 1 and 3, all active: 2 of a mean of 2. Active on half of one class only: 1/2."""
    x = np.array([[1, 0], [1, 0], [3, 7], [3, 0]])
    found = measure_differences(x, np.array([0, 0, 1, 1]))
    assert found == pytest.approx([1.0, 0.5], abs=1e-5)


def test_separable_classes_have_auroc_1_and_shuffled_labels_one_half():
    x = noise(TEXTS, 40)
    x[:, :3] += 6 * LABELS[:, None]
    split = split_texts(TEXTS, 0)
    assert score_sparse(x, LABELS, split, (1, 4)) == pytest.approx([1, 1], abs=1e-3)
    shuffled = []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(TEXTS)
        shuffled.append(score_sparse(x[order], LABELS, split, (1, 4)))
    assert np.mean(shuffled, 0) == pytest.approx([0.5] * 2, abs=0.06)


def test_nothing_of_the_test_part_reaches_a_probe():
    """Neither a unit that knows the labels of the test part alone, nor its values."""
    split = split_texts(TEXTS, 0)
    assert not {*split.train} & {*split.test} and len(split.train) + len(split.test) == TEXTS
    assert LABELS[split.train].mean() == LABELS[split.test].mean() == 0.5
    x = noise(TEXTS, 30, seed=1)
    x[split.test, 7] = 100 * LABELS[split.test]
    (auroc,) = score_sparse(x, LABELS, split, (1,))
    assert auroc < 0.7
    directions = project_on_random_directions(x, 50, LABELS, split.train, 5)
    changed = x.copy()
    changed[split.test] = 3
    again = project_on_random_directions(changed, 50, LABELS, split.train, 5)
    assert np.array_equal(directions[split.train], again[split.train])


@pytest.mark.slow
def test_a_probe_on_all_units_is_the_same_in_the_space_of_the_texts():
    x = np.maximum(noise(TEXTS, 600, seed=2), 0)
    x[:, :40] += 0.3 * LABELS[:, None]
    split = split_texts(TEXTS, 3)
    rotated = reduce_to_row_space(csr_array(x), split.train)
    assert rotated.shape[1] <= len(split.train)
    assert rotated @ rotated[split.train].T == pytest.approx(x @ x[split.train].T, abs=1e-2)
    direct, found = (score_probe(each, LABELS, split) for each in (x, rotated))
    assert found == pytest.approx(direct, abs=0.01)


def test_every_text_of_a_set_is_read_once_and_classes_are_balanced(tmp_path):
    texts = [f"text {n}\nof two lines" for n in range(70)]
    repeated = [*texts, *texts[:50], "both", "both"]
    labels = [*("yes" if n < 40 else "no" for n in range(70)), *["yes"] * 40, *["no"] * 10]
    write_set(tmp_path, "words", repeated, [*labels, "yes", "no"])
    write_set(tmp_path, "three", texts, [n % 3 for n in range(70)])
    (found,) = read_sets("all", str(tmp_path), 1000, 0)
    assert (found.name, found.classes, len(found.texts)) == ("words", ("no", "yes"), 60)
    assert len({*found.texts}) == 60 and "both" not in found.texts
    of_label = dict(zip(texts, labels, strict=False))
    assert [of_label[text] for text in found.texts] == ["no", "yes"] * 30
    assert len(read_sets("words", str(tmp_path), 45, 0)[0].texts) == 44


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sets": ["wrds"]}, "sets=wrds: no such set; similar names are words"),
        ({"sets": "three"}, "sets=three: 3 classes; probes are fitted on sets of two"),
        ({"sets": "few"}, "sets=few: 5 different texts of a class; 20 are needed"),
        ({"sets": "columns"}, "sets=columns: .*columns.csv is no CSV file with columns prompt and"),
        ({"sets": []}, "sets=.*: give usual, all, or names as"),
        ({"sets_folder": "nowhere"}, "sets_folder=nowhere: no files"),
        ({"texts": 10}, "texts=10: give 40 or more"),
        ({"suite": "nope"}, "suite=nope: choose from .*probing"),
    ],
)
def test_what_cannot_be_probed_is_refused_in_one_line(tmp_path, settings, message):
    _, sae = save_planted(tmp_path)
    folder, texts = tmp_path / "sets", [f"text {n}" for n in range(60)]
    write_set(folder, "words", texts, [n % 2 for n in range(60)])
    write_set(folder, "three", texts, [n % 3 for n in range(60)])
    write_set(folder, "few", texts[:10], [n % 2 for n in range(10)])
    (folder / "columns.csv").write_text("text,label\na,1\n")
    with pytest.raises(UserError, match=f"^{message}"):
        make_task(sae, **{"sets_folder": str(folder)} | settings).execute([])


def test_a_missing_package_is_told_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(probing_sets, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(UserError, match="not installed: pip install --no-deps sae-probes$"):
        find_set_files(None)
    data = tmp_path / "no_such_package_at_all" / "data" / "cleaned_data"
    data.mkdir(parents=True)
    (data.parents[1] / "__init__.py").write_text("raise ImportError('must not be imported')")
    for name in ("10_b", "9_a"):
        write_set(data, name, ["x"], [1])
    monkeypatch.syspath_prepend(tmp_path)
    assert [*find_set_files(None)] == ["9_a", "10_b"]
    assert "no_such_package_at_all" not in sys.modules


def test_the_last_token_of_each_text_is_read_whatever_is_beside_it(tiny):
    subject = make_subject(tiny("llama"))
    texts = [TEXT[:n] for n in (60, 9, 33, 20, 84)]
    found = read_last_tokens(subject, texts, 12)
    for row, text in zip(found, texts, strict=True):
        ids = subject.tokenizer(text, add_special_tokens=False)["input_ids"][-11:]
        tokens, site = torch.tensor([[0, *ids]]), subject.sites.source
        assert torch.allclose(row, capture(subject.llm.model, tokens, [site])[site][0, -1].float())


@pytest.mark.slow
def test_the_benchmark_finds_the_feature_that_reads_a_word_and_not_its_control(
    tmp_path, monkeypatch
):
    """One feature reads the last word of class 1; of a control none is ever active: AUROC 1/2."""
    _, sae = save_planted(tmp_path)
    words = TEXT.split()[:8]
    ends = [READS[n % 2] if n % 4 < 2 else f" {words[n % 8]}" for n in range(80)]
    texts = [" ".join(words[n % 7 :]) + f" {n}{end}" for n, end in enumerate(ends)]
    write_set(tmp_path / "sets", "wizards", texts, [int(end in READS) for end in ends])

    def load_controls(subject):
        control = make_subject(subject.llm).sae
        control.W_enc[:], control.b_enc[:] = 0, 0
        return {"control: frozen encoder": control}

    monkeypatch.setattr(probing_benchmark, "load_controls", load_controls)
    make_task(sae, sets_folder=str(tmp_path / "sets"), splits=2).execute([])
    numbers = json.loads((sae / "analysis" / "benchmark-probing.json").read_text())
    features, control = (numbers["auroc"][kind] for kind in ("features", "control: frozen encoder"))
    assert features["1"]["mean"] == features["1"]["sets"]["wizards"] == 1
    assert numbers["score"] == features["16"]["mean"] > 0.99
    assert {k: of_k["mean"] for k, of_k in control.items()} == dict.fromkeys(
        ["1", "4", "16", "64", "all"], 0.5
    )
    assert "all" in numbers["auroc"]["neurons"]
    assert "all" not in numbers["auroc"]["random directions"]
    page = (sae / "analysis" / "benchmark-probing.html").read_text()
    assert "control: frozen encoder" in page


def test_a_difference_within_its_noise_over_sets_is_not_called_one():
    """Differences of 0.049 and 0.051 have a mean of 0.05 and a standard error of 0.001; of 0.04 and
    0.06, of 0.01. Over two sets a t-test allows 12.7 standard errors."""
    sets = [LabelledSet(name, [], LABELS, ("a", "b")) for name in "ab"]
    sizes = {16: np.array([[0.7], [0.9]])}
    aurocs = {
        "features": sizes,
        "neurons": {16: sizes[16] - [[0.049], [0.051]]},
        "control: pca": {16: sizes[16] - [[0.04], [0.06]]},
    }
    scores = ProbingScores(sets, aurocs)
    assert scores.average_sets("features", 16) == pytest.approx((0.8, 0.1))
    assert compare_with_features(scores, "neurons") == (
        "neurons 0.750 (features are ahead by 0.050 ± 0.001)"
    )
    assert compare_with_features(scores, "control: pca") == (
        "control: pca 0.750 (no clear difference: +0.050 ± 0.010)"
    )
    one = ProbingScores(sets[:1], {kind: {16: of_k[16][:1]} for kind, of_k in aurocs.items()})
    assert compare_with_features(one, "neurons") == (
        "neurons 0.651 (+0.049; on one set the noise is unknown)"
    )
    assert math.isnan(one.average_sets("neurons", 16)[1]) and math.isnan(
        one.measure_spread("neurons", 16)
    )


def test_the_score_of_a_finished_run_is_read_if_it_was_made_with_the_same_settings_since(
    monkeypatch, tiny, tmp_path
):
    """As when a search is resumed, or tries the same settings twice."""
    calls, file = [], tmp_path / "analysis" / "benchmark-probing.json"
    usual = {"sets": "usual", "sets_folder": None, "texts": 1000, "splits": 2}

    def score(task, given_settings):
        calls.append(task.suite)
        return BenchmarkResult({"score": 0.8, "settings": usual}, [], 0.8), None

    monkeypatch.setattr(BenchmarkTask, "score", score)
    monkeypatch.setattr(BenchmarkTask, "write_results", lambda *args: write_json(file, args[2]))
    job = Job(config=make_subject(tiny("llama")).config, folder=tmp_path)
    file.parent.mkdir()
    write_json(tmp_path / METRICS_FILE, {})
    assert [benchmark_objective.score_job(job, "probing") for _ in range(3)] == [0.8] * 3
    assert calls == ["probing"]
    os.utime(tmp_path / METRICS_FILE, (2e9, 2e9))  # trained on since then
    benchmark_objective.score_job(job, "probing")
    os.utime(tmp_path / METRICS_FILE, (1e9, 1e9))
    write_json(file, {"score": 0.9, "settings": usual | {"splits": 5}})
    assert benchmark_objective.score_job(job, "probing") == 0.8 and len(calls) == 3


def test_a_search_maximises_the_score_of_a_benchmark(monkeypatch, tiny):
    """It is run on each trained SAE, but not on controls that the sweep adds, nor unasked."""
    assert {*BENCHMARKS} == BENCHMARK_OBJECTIVES
    monkeypatch.setattr(probing_sets, "PACKAGE", "no_such_package_at_all")
    monkeypatch.setattr(benchmark_objective, "train_jobs", lambda jobs: [{"l0": 5.0} for _ in jobs])
    monkeypatch.setattr(benchmark_objective, "score_job", lambda job, suite: 0.8)
    subject = make_subject(tiny("llama"))

    def make_job(control=None, **sweep) -> Job:
        config = replace(subject.config, sweep=SweepConfig(**sweep))
        model = replace(config.model, control=control)
        return Job(config=replace(config, model=model), folder=Path())

    assert benchmark_objective.train_and_score([make_job()]) == [{"l0": 5.0}]
    asked = {"objective": "probing", "controls": True}
    jobs = [make_job(**asked), make_job(Control.frozen_decoder, **asked)]
    with pytest.raises(UserError, match="not installed: pip install --no-deps sae-probes$"):
        benchmark_objective.train_and_score(jobs)
    monkeypatch.setitem(BENCHMARKS, "probing", BENCHMARKS["probing"]._replace(check=lambda: None))
    metrics = benchmark_objective.train_and_score(jobs)
    assert metrics == [{"l0": 5.0, "probing": 0.8}, {"l0": 5.0}]
    assert compute_objective(metrics[0], jobs[0].config.sweep) == 0.8
    with pytest.raises(
        UserError, match="sweep.objective=probing is not measured on data=synthetic"
    ):
        replace(subject.config, data=SyntheticConfig(), sweep=SweepConfig(objective="probing"))
