"""Means and spreads over seeds, and which differ significantly, on numbers worked by hand."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from sae_lightning.report.means import MeansTable
from sae_lightning.report.noise import CRITICAL_T, Estimates, differ_significantly
from sae_lightning.report.sweep_report import CSV, MEANS_CSV, PAGE, write_report
from sae_lightning.report.sweep_table import SweepRun, SweepTable

NAN = math.nan


def seed_run(
    folder: Path,
    seed: int,
    ev: float | None,
    control: str | None = None,
    model: str = "topk",
    **held_out: float,
) -> SweepRun:
    """A run that was swept over `model`, `model.control` and `model.seed`; finished if it has an
    explained variance."""
    overrides = [f"model={model}", f"model.control={control or 'null'}", f"model.seed={seed}"]
    held_out = {"l0": 32.0, "explained_variance": ev} | held_out
    metrics = {"tokens": 4096, "held_out": held_out, "training": {"train/dead": 0.0}}
    settings = {
        **{"model.name": model, "model.control": control, "model.seed": seed, "seed": 0},
        **{"model.features": 64, "trainer.tokens": 4096, "layer.source": "resid"},
    }
    path = folder / ",".join(overrides)
    path.mkdir(parents=True)
    failure = "its loss became nan" if ev is None else None
    return SweepRun(path, overrides, metrics if ev else None, failure, settings)


def sweep_of(folder: Path, scores: dict[tuple[str, str | None], list[float]]) -> list[SweepRun]:
    """Runs of each (model, control) with an explained variance per seed."""
    return [
        seed_run(folder, seed, ev, control, model)
        for (model, control), values in scores.items()
        for seed, ev in enumerate(values)
    ]


def estimate(mean: float, spread: float, seeds: int) -> Estimates:
    return Estimates(*(np.array([x], dtype=float) for x in (mean, spread, seeds)))


@pytest.mark.parametrize(
    ("other", "apart"),
    [
        # 3 seeds each, spread 3: Welch's t-test has 4 degrees of freedom and allows
        # 2.776 sqrt(3^2/3 + 3^2/3) = 6.8
        (estimate(6.7, 3, 3), False),
        (estimate(6.9, 3, 3), True),
        # one seed borrows the spread: 4.303 sqrt(3^2/3 + 3^2/1) = 14.9 with 2 degrees
        (estimate(14.8, NAN, 1), False),
        (estimate(15.0, NAN, 1), True),
        # no spread on one side: 4.303 sqrt(3^2/3) = 7.45 with 2 degrees
        (estimate(7.4, 0, 3), False),
        (estimate(7.5, 0, 3), True),
        (estimate(NAN, 3, 3), False),
    ],
)
def test_means_are_told_apart_beyond_what_welchs_test_allows(other, apart):
    one = estimate(0, 3, 3)
    assert differ_significantly(one, other) == differ_significantly(other, one) == [apart]


def test_with_many_seeds_a_difference_must_still_exceed_the_spread():
    # 31 degrees of freedom or more: 2.042 sqrt(2 * 3^2/100) = 0.87, less than the spread of 3
    one = estimate(0, 3, 100)
    assert not differ_significantly(one, estimate(2.9, 3, 100))
    assert differ_significantly(one, estimate(3.1, 3, 100))


def test_two_single_runs_are_compared_as_they_are():
    assert differ_significantly(estimate(1, NAN, 1), estimate(1 + 1e-9, NAN, 1))
    assert not differ_significantly(estimate(1, NAN, 1), estimate(1, NAN, 1))


def test_the_critical_values_are_students():
    from scipy.stats import t

    exact = t.ppf(0.975, np.arange(1, len(CRITICAL_T) + 1))
    assert pytest.approx(exact, abs=6e-4) == CRITICAL_T


def test_a_row_is_the_mean_over_seeds_of_a_trained_sae_or_of_a_control(tmp_path, capsys):
    runs = sweep_of(
        tmp_path,
        {
            ("topk", "frozen_decoder"): [0.60, 0.62],
            ("topk", None): [0.70, 0.74, 0.72],
            ("relu", None): [0.5, 0.6],
        },
    )
    means = MeansTable(SweepTable(runs))
    assert means.keys == ["model"]
    assert [*zip(means.frame.model, means.kinds, means.num_finished, strict=True)] == [
        ("relu", "trained", 2),
        ("topk", "trained", 3),
        ("topk", "frozen_decoder", 2),
    ]
    # deviations -.02, .02, 0: sqrt((.0004 + .0004) / (3 - 1)) = .02
    assert means.format_cell(1, "explained_variance") == "0.7200 ± 0.0200"
    assert len({*means.experiments}) == 2 and means.experiments[1] == means.experiments[2]
    write_report(tmp_path, runs)
    with open(tmp_path / CSV, newline="") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 7 and [*rows[0]][:3] == ["model", "model.control", "model.seed"]
    with open(tmp_path / MEANS_CSV, newline="") as file:
        relu, topk, _ = csv.DictReader(file)
    assert (relu["kind"], relu["seeds"], topk["status"]) == ("trained", "2", "finished")
    assert float(topk["explained_variance"]) == pytest.approx(0.72)
    assert float(topk["explained_variance.spread"]) == pytest.approx(0.02)
    assert "0.7200 ± 0.0200" in capsys.readouterr().out
    page = (tmp_path / PAGE).read_text("utf8")
    assert "0.7200 ± 0.0200" in page and ">seed 2</a>" in page


def test_what_is_not_told_apart_from_the_best_is_marked_like_it(tmp_path):
    close = {("relu", None): [0.70, 0.72, 0.74], ("topk", None): [0.71, 0.73, 0.75]}
    far = {("gated", None): [0.40, 0.42, 0.44]}
    means = MeansTable(SweepTable(sweep_of(tmp_path / "1", close | far)))
    marks = {
        model: means.mark(row, "explained_variance") for row, model in enumerate(means.frame.model)
    }
    assert marks == {"relu": "≈", "topk": "≈", "gated": ""}
    assert dict(zip(means.frame.model, means.front, strict=True)) == {
        "relu": True,  # at the same L0, topk is not better by more than the noise
        "topk": True,
        "gated": False,
    }
    means = MeansTable(SweepTable(sweep_of(tmp_path / "2", far | {("relu", None): [0.7, 0.71]})))
    assert [means.mark(row, "explained_variance") for row in range(2)] == ["", "*"]


def test_controls_have_a_front_of_their_own(tmp_path):
    kinds = {("topk", None): [0.7], ("topk", "pca"): [0.9], ("topk", "frozen_decoder"): [0.6]}
    means = MeansTable(SweepTable(sweep_of(tmp_path, kinds)))
    front = dict(zip(means.kinds, means.front, strict=True))
    assert front == {"trained": True, "pca": True, "frozen_decoder": False}


def test_a_failed_repetition_is_left_out_of_the_mean_and_shown(tmp_path, capsys):
    runs = sweep_of(tmp_path, {("topk", None): [0.70, None, 0.74], ("relu", None): [None, None]})
    means = MeansTable(SweepTable(runs))
    assert means.format_cell(1, "explained_variance") == "0.7200 ± 0.0283"
    assert means.format_cell(0, "explained_variance") == "–"
    assert [*means.frame.status] == ["failed", "2 finished, 1 failed"]
    write_report(tmp_path, runs)
    assert "failed: model=topk, model.seed=1: its loss became nan" in capsys.readouterr().out


def test_settings_that_were_tried_twice_are_no_two_seeds(tmp_path):
    """As a search may do."""
    runs = [seed_run(tmp_path / trial, 0, 0.7) for trial in ("0", "1")]
    runs += [seed_run(tmp_path, 1, 0.8), seed_run(tmp_path, 0, None, model="relu")]
    runs += [seed_run(tmp_path, 1, None, model="relu")._replace(metrics=None)]
    write_report(tmp_path, runs)
    means = MeansTable(SweepTable(runs))
    assert [*means.num_finished] == [0, 2, 1]
    assert means.format_cell(2, "explained_variance") == "0.7000"
    assert means.frame.tokens[0] is None
    page = (tmp_path / PAGE).read_text("utf8")
    assert ">seed 1</a>" in page and ">nan<" not in page


def test_a_sweep_without_repetitions_has_no_file_of_means(tmp_path):
    (tmp_path / MEANS_CSV).touch()
    write_report(tmp_path, sweep_of(tmp_path, {("topk", None): [0.7], ("relu", None): [0.6]}))
    assert not (tmp_path / MEANS_CSV).exists()
