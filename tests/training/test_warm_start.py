"""Warm starts: a head that starts from a saved SAE computes what that SAE does, and goes on."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_run import checkpoint as read_checkpoint
from test_run import curves, leaves, metrics, stop_after, weights
from tiny_run import WORLD_BATCH as BATCH
from tiny_run import fill_from_start, synthetic_job
from torch import Generator
from torch.nn.functional import normalize
from torch.testing import assert_close

from sae_lightning import UserError, load_sae
from sae_lightning.analysis.evaluate import evaluate
from sae_lightning.formats.saved_format import save_sae
from sae_lightning.llm.sites import Kind, Site, distinct_sites
from sae_lightning.report.sweep_report import write_report
from sae_lightning.runs import passes
from sae_lightning.runs.folders import read_sweep_runs
from sae_lightning.runs.jobs import read_job
from sae_lightning.sae import ARCHITECTURES, build_sae
from sae_lightning.sae.controls import Control
from sae_lightning.sae.initial import rescale_strengths
from sae_lightning.training.callbacks.normalize import Normalize
from sae_lightning.training.head import Head
from sae_lightning.training.module import SAEModule
from sae_lightning.training.settings import (
    CallbacksConfig,
    Normalization,
    NormalizeConfig,
    OptimConfig,
)
from sae_lightning.training.warm_start import count_fates, start_head

D, FEATURES, K = 16, 48, 5
X = 3 * torch.randn(300, D, generator=Generator().manual_seed(9)) + 1


def config_of(name: str, **settings):
    row, given = ARCHITECTURES[name], {"features": FEATURES} | settings
    if hasattr(row.config, "k"):
        given = {"k": K} | given
    return row.config(name=name, **given)


def save_random(folder, name: str, *, own=True, norms=(1.0, 1.0), **settings):
    """Save an SAE of random weights whose decoder rows have norms in an interval."""
    random = Generator().manual_seed(1)
    sae = build_sae(config_of(name, **settings), D, D, random)
    weights = sae.weights()
    for weight in ("b_enc", "b_mag", "r_mag", "b_dec", "W_skip"):
        if weight in weights:
            weights[weight] = 0.3 * torch.randn(weights[weight].shape, generator=random)
    if "threshold" in weights:
        spread = 0 if sae.features_compete else torch.rand(FEATURES, generator=random)
        weights["threshold"] = 0.4 + 0.5 * spread + torch.zeros(FEATURES)
    drawn = torch.linspace(*norms, FEATURES)
    weights["W_dec"] = normalize(weights["W_dec"]) * drawn[:, None]
    sae.load_weights(weights)
    said = {"model_name": "none"} | ({"sae_lightning": {"llm.name": "none"}} if own else {})
    save_sae(folder, sae, sae.weights(), said)
    return str(folder)


def make_head(config, start: str, target=Kind.resid) -> Head:
    """A new head whose normalisation is measured."""
    random = Generator().manual_seed(2)
    config = replace(config, start=start)
    head = Head(
        build_sae(config, D, D),
        name="head",
        folder=None,
        source=Site(0, Kind.resid if target is Kind.resid else Kind.mlp_in),
        target=Site(0, target),
        loss=ARCHITECTURES[config.name].loss(),
        optim=OptimConfig(),
        callbacks=CallbacksConfig(),
        dead_window=1000,
        seed=0,
    )
    head.start, head.settings = start, {}
    head.in_mean.copy_(torch.randn(D, generator=random))
    head.in_scale.fill_(2.5)
    same = target is Kind.resid
    head.out_mean.copy_(head.in_mean if same else torch.randn(D, generator=random))
    head.out_scale.fill_(2.5 if same else 0.7)
    return head


def begin(head: Head):
    optimizer = SAEModule([head], batch=BATCH, steps=10).configure_optimizers()
    return start_head(head, optimizer), optimizer


def assert_same_function(head: Head, start) -> None:
    """On raw activations, the head computes what the saved SAE does."""
    now, then = head.reconstruct_raw(X), load_sae(start)(X)
    assert_close(now.reconstruction, then.reconstruction, rtol=1e-4, atol=1e-3)
    assert 0 < (then.features > 0).float().mean() < 1
    assert torch.equal(now.features > 0, then.features > 0)


CASES = [
    *((name, {}, (1.0, 1.0)) for name in ARCHITECTURES),
    *((name, {}, (0.3, 3.0)) for name in ARCHITECTURES),
    *((name, {"skip": True}, (1.0, 1.0)) for name in ("relu", "topk", "batch_topk", "jumprelu")),
]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("name", "settings", "norms"), CASES)
def test_a_head_starts_as_the_sae_that_it_starts_from(tmp_path, name, settings, norms, own):
    start = save_random(tmp_path / "start", name, own=own, norms=norms, **settings)
    fixed = name == "gated" or norms == (1.0, 1.0) and ARCHITECTURES[name].network.features_compete
    config = config_of(name, fixed_norm=fixed, decoder_norm=0.5, **settings)
    head = make_head(config, start, Kind.mlp if settings else Kind.resid)
    line, _ = begin(head)
    assert line == f"starting from {start}: 48 features"
    assert_same_function(head, start)
    rows = head.sae.W_dec.norm(dim=1)
    if fixed:
        assert_close(rows, torch.full_like(rows, 0.5))
        before = head.reconstruct_raw(X).reconstruction
        head.sae.fix_norms()  # as after each update
        assert_close(head.reconstruct_raw(X).reconstruction, before)
    elif own:
        assert_close(rows, load_sae(start).W_dec.norm(dim=1) / head.out_scale)
    else:
        assert rows.mean().item() == pytest.approx(1, rel=1e-4)


def test_the_weights_of_a_start_by_hand(tmp_path):
    """u = (x - 1) / 2, so z = 3 x - 2 = 6 u + 1, and y = (x_hat - 1) / 2 = (5 f + 7 - 1) / 2."""
    sae = build_sae(config_of("relu", features=1), 1, 1)
    hand = {"W_enc": [[3.0]], "b_enc": [-2.0], "W_dec": [[5.0]], "b_dec": [7.0]}
    sae.load_weights({name: torch.tensor(value) for name, value in hand.items()})
    one, two = torch.ones(1), torch.tensor(2.0)
    found = sae.fold(-one / two, 1 / two, -one / two, 1 / two)
    assert {name: value.flatten().tolist() for name, value in found.items()} == {
        "W_enc": [6.0],
        "b_enc": [1.0],
        "W_dec": [2.5],
        "b_dec": [3.0],
    }
    # a feature twice as strong, whose row is half as long
    rescaled = rescale_strengths(found | {"threshold": torch.ones(1)}, torch.tensor([2.0]))
    assert {name: value.item() for name, value in rescaled.items()} == {
        "W_enc": 12.0,
        "b_enc": 2.0,
        "W_dec": 1.25,
        "b_dec": 3.0,
        "threshold": 2.0,
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_dictionary_grows_by_features_as_in_a_cold_start(tmp_path, name):
    start = save_random(tmp_path / "start", name)
    head = make_head(config_of(name, features=80), start)
    cold = build_sae(config_of(name, features=80), D, D)
    line, _ = begin(head)
    assert line.endswith(": 48 features, and 32 new ones")
    sae = head.sae
    assert torch.equal(sae.W_dec[48:], cold.W_dec[48:])
    assert torch.equal(sae.b_enc[48:], cold.b_enc[48:])
    assert_close(normalize(sae.W_dec[:48]), normalize(load_sae(start).W_dec))
    if sae.features_compete and hasattr(sae, "threshold"):
        assert len(set(sae.threshold.tolist())) == 1
    # without the new ones it is the SAE that it starts from
    with torch.no_grad():
        sae.b_enc[48:] = -1e9
    then = load_sae(start)(X)
    assert_close(head.reconstruct_raw(X).reconstruction, then.reconstruction, rtol=1e-4, atol=1e-3)
    assert head.start_rows[48:].abs().sum() == 0


def test_new_features_are_cold_ones_without_normalisation_too(tmp_path):
    """There, biases are in units of the activations, whose root mean square is 5 here."""
    start, config = save_random(tmp_path / "start", "relu"), config_of("relu", features=80)
    grown, cold = make_head(config, start), make_head(config, start)
    cold.start = None
    for head in (grown, cold):
        head.callbacks.normalize.mode = Normalization.none
    stream = SimpleNamespace(peek=lambda tokens: {grown.source: torch.full((9, D), 5.0)})
    trainer = SimpleNamespace(global_step=0, datamodule=SimpleNamespace(stream=stream))
    Normalize().on_train_start(trainer, SimpleNamespace(heads=[grown, cold]))
    begin(grown)
    assert torch.equal(grown.sae.b_enc[48:], torch.full((32,), -5.0))
    assert torch.equal(grown.sae.b_enc[48:], cold.sae.b_enc[48:])
    assert_close(grown.sae.b_enc[:48], load_sae(start).b_enc)


def test_fates_by_hand(tmp_path):
    """One feature of each fate, two of one."""
    head = make_head(config_of("relu", features=6), save_random(tmp_path / "s", "relu"))
    east, north, between = [1.0, 0.0], [0.0, 1.0], [0.8, 0.6]  # cosines 0 and 0.8 to east
    near = [0.95, (1 - 0.95**2) ** 0.5]
    now = torch.zeros(6, D)
    now[:, :2] = 3 * torch.tensor([near, between, east, north, east, east])
    head.sae.W_dec.data.copy_(now)
    head.start_rows[:5, 0] = 1  # the last one is new
    head.start_fired.copy_(torch.tensor([1, 1, 1, 0, 0, 0]))
    fires = torch.tensor([True, True, False, True, False, True])
    assert count_fates(head, fires) == {
        "stayed": 1,
        "moved": 1,
        "died": 1,
        "born": 2,
        "silent": 1,
    }


@pytest.fixture
def job(tmp_path):
    """job(name, steps, architecture, **groups) -> a job on 32 concepts in 16 dimensions."""

    def make(name, steps=60, architecture="relu", **changes):
        model, loss = config_of(architecture), ARCHITECTURES[architecture].loss()
        made = synthetic_job(tmp_path / name, **{"model": model, "loss": loss} | changes)
        made.config.trainer = replace(made.config.trainer, tokens=steps * BATCH)
        return made

    return make


def start_from(job, start, **typed):
    """The job with `model.start`, and other settings of the model that are typed."""
    job.config.model = replace(job.config.model, start=str(start), **typed)
    job.config = fill_from_start(job.config, [f"model.{name}={x}" for name, x in typed.items()])
    return job


def score(job, folder):
    """What task=evaluate measures of the SAE in a folder on the job's held-out data."""
    sites = job.config.layer.resolve_sites(1)
    held_out = job.config.data_source.open_held_out(distinct_sites([sites]), 2000, 0)
    return evaluate(load_sae(folder), held_out, sites).card.scalars()


def sweep(tmp_path, jobs):
    return [replace(each, sweep_folder=tmp_path / "sweep", overrides=[]) for each in jobs]


@pytest.mark.slow
def test_the_first_held_out_score_is_that_of_the_sae_it_starts_from(job, tmp_path, capsys):
    cold = [job(f"sweep/{name}", 30, name) for name in ARCHITECTURES]
    passes.train_jobs(sweep(tmp_path, cold))
    modes = {mode: CallbacksConfig(normalize=NormalizeConfig(mode=mode)) for mode in Normalization}
    warm = [
        start_from(
            job(f"sweep/{name}-{mode.name}", 2, name, callbacks=callbacks, seed=3),
            tmp_path / "sweep" / name / "sae",
        )
        for name in ARCHITECTURES
        for mode, callbacks in modes.items()
    ]
    mixed = job("sweep/cold", 2, seed=3)
    capsys.readouterr()
    passes.train_jobs(sweep(tmp_path, [*warm, mixed]))
    printed = capsys.readouterr().out.replace("\n", " ")
    assert printed.count(": 48 features, with the normalisation and Adam's moments") == 7
    for each in warm:
        expected = score(each, each.config.model.start)
        found = metrics(each.folder)["start"]
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-4), each.folder
        drawn = curves(each.folder)
        for name, value in found.items():
            assert drawn[f"held_out/{name}"][0] == (0, pytest.approx(value))
        fates = metrics(each.folder)["fates"]
        assert sum(fates.values()) == FEATURES
        assert drawn["start/stayed"][0][1] == FEATURES - round(found["unfired"] * FEATURES)
        assert drawn["start/stayed"][-1][1] == fates["stayed"]
    assert "start" not in metrics(mixed.folder)
    assert "held_out/l0" in curves(mixed.folder)
    write_report(tmp_path / "sweep", read_sweep_runs(tmp_path / "sweep"))
    assert "stayed" in (tmp_path / "sweep" / "sweep.html").read_text("utf8")


@pytest.mark.slow
def test_a_run_that_is_trained_longer_takes_over_adam_and_the_normalisation(job, tmp_path):
    first, longer = job("first", 30, "jumprelu"), job("longer", 30, "jumprelu", seed=1)
    passes.train_jobs([first])
    start_from(longer, first.folder, features=64)
    saved = read_checkpoint(first.folder)
    head = make_head(longer.config.model, str(first.folder))
    head.settings = longer.config.list_fixed_settings()
    line, optimizer = begin(head)
    assert line == (
        f"starting from {first.folder}: 48 features, and 16 new ones, with the normalisation and "
        "Adam's moments of its checkpoint"
    )
    for name in ("in_mean", "in_scale", "out_mean", "out_scale"):
        assert torch.equal(getattr(head, name), saved["state_dict"][f"heads.0.{name}"])
    names = [name for names in head.group_parameters() for name in names]
    for number, name in enumerate(names):
        own = dict(head.sae.named_parameters())[name]
        before = saved["state_dict"][f"heads.0.sae.{name}"]
        dim = head.sae.split_dims.get(name)
        state, old = optimizer.state[own], saved["optimizer_states"][0]["state"][number]
        assert state["step"] == 30
        n = None if dim is None else 48
        part = own if n is None else own.narrow(dim, 0, n)
        assert_close(part, before, rtol=1e-5, atol=1e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            moment = state[key]
            assert moment.stride() == own.stride()
            assert torch.equal(moment if n is None else moment.narrow(dim, 0, n), old[key])
            assert n is None or moment.narrow(dim, n, 16).abs().sum() == 0


@pytest.mark.slow
def test_features_that_were_added_are_born_or_silent(job, tmp_path):
    first, grown = job("first", 20), job("grown", 2)
    passes.train_jobs([first])
    passes.train_jobs([start_from(grown, first.folder, features=64)])
    fates = metrics(grown.folder)["fates"]
    assert sum(fates.values()) == 64
    assert fates["born"] + fates["silent"] >= 16 and fates["born"] > 0


@pytest.mark.slow
def test_adam_starts_anew_where_its_moments_would_be_in_other_units(job, tmp_path):
    first, other = job("first", 5), job("other", 5)
    passes.train_jobs([first])
    start_from(other, first.folder)
    other.config.callbacks.normalize.mode = Normalization.scale
    head = make_head(other.config.model, str(first.folder))
    head.settings = other.config.list_fixed_settings()
    line, optimizer = begin(head)
    assert line.endswith(
        "; Adam starts anew, because callbacks.normalize.mode is not that of its checkpoint"
    )
    assert not optimizer.state
    assert head.in_scale == 2.5
    assert_same_function(head, str(first.folder))
    # without an LLM nothing but the data says where activations come from
    other.config.callbacks.normalize.mode = first.config.callbacks.normalize.mode
    other.config.data = replace(other.config.data, concepts=40)
    head = make_head(other.config.model, str(first.folder))
    head.settings = other.config.list_fixed_settings()
    line, optimizer = begin(head)
    assert line.endswith("; Adam starts anew, because data.concepts is not that of its checkpoint")
    assert not optimizer.state


@pytest.mark.slow
def test_an_sae_that_starts_from_a_control_is_none_and_starts_adam_anew(job, tmp_path):
    """What the control has frozen has no moments."""
    control, other = job("control", 5), job("other", 5)
    control.config.model.control = Control.frozen_encoder
    passes.train_jobs([control])
    head = make_head(other.config.model, str(control.folder))
    head.settings = other.config.list_fixed_settings()
    line, optimizer = begin(head)
    assert line.endswith(
        ": 48 features of a control (frozen_encoder), which trains on as an SAE; Adam starts anew, "
        "because model.control is not that of its checkpoint"
    )
    assert not optimizer.state
    warm = start_from(job("warm", 5), control.folder)
    assert warm.config.model.control is None
    assert_same_function(head, str(control.folder))


@pytest.mark.slow
def test_a_kept_sae_has_no_checkpoint(job, tmp_path):
    first = job("first", 6)
    first.config.trainer = replace(first.config.trainer, keep_every=3 * BATCH)
    passes.train_jobs([first])
    head = make_head(first.config.model, str(first.folder / "sae-384"))
    assert begin(head)[0].endswith("sae-384: 48 features")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_told(job, tmp_path):
    first = job("first", 3)
    passes.train_jobs([first])
    head = make_head(first.config.model, str(first.folder))
    file = first.folder / "checkpoints" / "last.ckpt"
    saved = read_checkpoint(first.folder)
    head.settings = saved["settings"]
    del saved["optimizer_states"][0]["state"][1]
    torch.save(saved, file)
    with pytest.raises(UserError, match=r"its checkpoint is damaged \(it lacks 1\); give .*/sae"):
        begin(head)
    file.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="its checkpoint is damaged"):
        begin(head)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "batch_topk"])
def test_a_warm_run_resumes_exactly_though_its_start_is_gone(job, tmp_path, monkeypatch, name):
    first, whole, stopped = (job(n, 30, name) for n in ("first", "whole", "stopped"))
    passes.train_jobs([first])
    for each in (whole, stopped):
        start_from(each, first.folder)
    passes.train_jobs([whole])
    stop_after(monkeypatch, 23, stopped)
    shutil.rmtree(first.folder)
    passes.train_jobs([replace(read_job(stopped.folder), resumed=True)])
    assert weights(stopped.folder) == weights(whole.folder)
    one, other = (read_checkpoint(each.folder) for each in (whole, stopped))
    for key in ("state_dict", "optimizer_states"):
        assert leaves(one[key]) == leaves(other[key])
    assert curves(whole.folder) == curves(stopped.folder)
    for section in ("held_out", "start", "fates"):
        assert metrics(whole.folder)[section] == metrics(stopped.folder)[section]
    # a further run from it takes over what Adam has counted
    third = start_from(job("third", 2, name), whole.folder)
    passes.train_jobs([third])
    assert read_checkpoint(third.folder)["optimizer_states"][0]["state"][0]["step"] == 62


def test_a_run_whose_start_is_gone_before_it_has_begun_says_so(job, tmp_path):
    gone = job("run", 3)
    gone.config.model = replace(gone.config.model, start=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"^model\.start=[^ ]*/gone: no such folder or file"):
        passes.train_jobs([gone])
