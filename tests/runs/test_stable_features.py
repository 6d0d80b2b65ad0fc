"""The features that come back under another seed, in run folders whose decoders are known."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_lightning.formats.saved_format import save_sae
from sae_lightning.report.sweep_table import SweepRun
from sae_lightning.runs import stable_features
from sae_lightning.runs.folders import DENSITY_FILE
from sae_lightning.runs.stable_features import STABLE_FILE, add_stable_features
from sae_lightning.sae import ARCHITECTURES, build_sae

WIDTH, FEATURES, DEAD = 32, 8, 2


def save_run(folder: Path, seed: int, decoder: torch.Tensor, l1: str = "1") -> SweepRun:
    """A finished run with these decoder rows, of which the last DEAD never fire."""
    path = folder / f"loss.l1={l1},model.seed={seed}"
    sae = build_sae(ARCHITECTURES["relu"].config(features=FEATURES), WIDTH, WIDTH)
    path.mkdir()
    (path / "sae").mkdir()
    save_sae(path / "sae", sae, sae.weights() | {"W_dec": decoder.contiguous()}, {})
    density = torch.full((FEATURES,), 0.1)
    density[-DEAD:] = 0
    save_file({"density": density}, path / DENSITY_FILE)
    metrics = {"tokens": 8, "held_out": {"l0": 2.0, "explained_variance": 0.5}, "training": {}}
    overrides = [f"loss.l1={l1}", f"model.seed={seed}"]
    return SweepRun(path, overrides, metrics, None, {"loss.l1": l1, "model.seed": seed})


@pytest.fixture
def runs(tmp_path) -> list[SweepRun]:
    """Three seeds with six live features each: the second has all of the first's in another order,
    the third has half of them; and a run without repetitions."""
    rows = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0]
    orders = [0, 1, 2, 3, 4, 5, 30, 31], [5, 4, 3, 2, 1, 0, 28, 29], [0, 1, 2, 10, 11, 12, 30, 31]
    seeds = [save_run(tmp_path, seed, rows[order]) for seed, order in enumerate(orders)]
    return [*seeds, save_run(tmp_path, 0, rows[orders[0]], l1="2")]


def test_the_share_is_of_live_features_and_the_mean_over_the_other_seeds(runs, tmp_path):
    # first and second: 6 of 6; first and third: 3 of 6; second and third: 3 of 6
    shares = [run.stable for run in add_stable_features(tmp_path, runs)]
    assert shares == [0.75, 0.75, 0.5, None]


def test_saes_of_other_concepts_are_not_compared(runs, tmp_path):
    for run, seed in zip(runs, [5, 5, 6, 5], strict=True):
        run.settings["data.seed"] = seed
    shares = [run.stable for run in add_stable_features(tmp_path, runs)]
    assert shares == [1.0, 1.0, None, None]


def test_a_sweep_is_compared_once_and_a_new_sae_again(runs, tmp_path, monkeypatch):
    first = add_stable_features(tmp_path, runs)
    compared, compare = [], stable_features._measure_shares
    monkeypatch.setattr(
        stable_features, "_measure_shares", lambda *rows: compared.append(1) or compare(*rows)
    )
    assert add_stable_features(tmp_path, runs) == first and not compared
    decoder = torch.eye(FEATURES, WIDTH)
    sae = build_sae(ARCHITECTURES["relu"].config(features=FEATURES), WIDTH, WIDTH)
    save_sae(runs[2].folder / "sae", sae, sae.weights() | {"W_dec": decoder}, {})
    shares = [run.stable for run in add_stable_features(tmp_path, runs)]
    assert shares == [0.5, 0.5, 0.0, None] and len(compared) == 2
    assert len(json.loads((tmp_path / STABLE_FILE).read_text())) == 3, "only of what is there"


@pytest.mark.parametrize("content", ["{", "[]", '{"a b": 3}', '{"a b": [null, 1]}'])
def test_a_damaged_file_of_shares_is_computed_again(runs, tmp_path, content):
    (tmp_path / STABLE_FILE).write_text(content)
    assert [run.stable for run in add_stable_features(tmp_path, runs)][0] == 0.75


def test_runs_without_densities_and_sweeps_without_repetitions_have_no_share(runs, tmp_path):
    (runs[1].folder / DENSITY_FILE).unlink()
    (runs[2].folder / DENSITY_FILE).unlink()
    assert {run.stable for run in add_stable_features(tmp_path, runs)} == {None}
    assert not (tmp_path / STABLE_FILE).exists()
