"""A transcoder is any architecture whose target is another site than its source."""

from dataclasses import replace

import pytest
from test_run import RESAMPLING, assert_same, metrics, resume, stop_after, weights

from sae_lightning import load_sae
from sae_lightning.analysis.evaluate import evaluate
from sae_lightning.llm.sites import Kind, LayerConfig, Site, SitePair
from sae_lightning.runs import passes
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.scoring.metrics import QualitySums
from sae_lightning.stream import rows
from sae_lightning.training.settings import OptimConfig

LAYER = LayerConfig(index=1, source=Kind.mlp_in, target=Kind.mlp)
SITES = SitePair(Site(1, Kind.mlp_in), Site(1, Kind.mlp))


@pytest.fixture
def transcoder(job):
    """transcoder(name, **groups) -> a job of 40 updates from the MLP's input to its output."""
    return lambda name, **changes: job(name, layer=LAYER, **changes)


def architecture(name):
    """Groups of a small SAE of that architecture that learns within 40 updates."""
    config, _, loss = ARCHITECTURES[name]
    sparse = {"k": 12} if "k" in config.__dataclass_fields__ else {}
    return {
        "model": config(name=name, features=48, **sparse),
        "loss": loss(),
        "optim": OptimConfig(lr=2e-2),
    }


@pytest.fixture(scope="module")
def learned(common_job):
    """{architecture: its job, which has been trained in a sweep}."""
    jobs = {}
    for name in ARCHITECTURES:
        job = common_job(f"sweep/{name}", layer=LAYER, **architecture(name))
        jobs[name] = replace(job, multirun=True, sweep_folder=job.folder.parent)
    passes.train_jobs(list(jobs.values()))
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_learns_the_mlp_and_is_saved_as_it_is_scored(learned, name):
    done = learned[name]
    said = metrics(done.folder)["held_out"]
    sae = load_sae(done.folder)
    assert sae.metadata["hook_name"] == "blocks.1.mlp.hook_in"
    assert sae.metadata["hook_name_out"] == "blocks.1.hook_mlp_out"

    held_out = done.config.data_source.open_held_out(SITES, 150, 150)
    x, y = (held_out.activations(site) for site in SITES)
    quality = QualitySums()
    quality.add(y, *sae(x))
    explained = quality.result().explained_variance
    assert explained > 0.3, "of the MLP's output; the mean explains 0"
    assert explained == pytest.approx(said["explained_variance"], abs=1e-4)
    card = evaluate(sae, held_out, SITES).card
    measured = card.scalars()
    assert measured.keys() - said.keys() == {"ce_error"}, "what training does not measure"
    assert {name: measured[name] for name in said} == pytest.approx(said, rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_the_mlp_is_learned_and_not_its_input(transcoder, job):
    """With the same weights at the start, only the target differs."""
    settings = {"optim": OptimConfig(lr=2e-2)}
    both = [
        transcoder("transcoder", **settings),
        job("autoencoder", layer=LayerConfig(index=1, source=Kind.mlp_in), **settings),
    ]
    passes.train_jobs(both)
    names = [load_sae(one.folder).metadata for one in both]
    assert "hook_name_out" in names[0]
    assert "hook_name_out" not in names[1]
    assert names[0]["hook_name"] == names[1]["hook_name"]
    assert names[0]["hf_hook_name_out"].startswith("model.layers.1.")
    held_out = both[0].config.data_source.open_held_out(SITES, 150, 150)
    x, y = (held_out.activations(site) for site in SITES)
    errors = {}
    for one in both:
        reconstruction = load_sae(one.folder)(x).reconstruction
        for name, wanted in (("input", x), ("output", y)):
            spread = (wanted - wanted.mean(dim=0)).square().sum()
            error = (reconstruction - wanted).square().sum() / spread
            errors[one.folder.name, name] = error.item()
    assert errors["transcoder", "output"] < 0.8 < 1 < errors["transcoder", "input"]
    assert errors["autoencoder", "input"] < 0.8 < 1 < errors["autoencoder", "output"]


@pytest.mark.slow
def test_a_killed_transcoder_ends_the_same(transcoder, monkeypatch):
    settings = {"loss": ReLULoss(l1=0.3), "optim": OptimConfig(lr=3e-2), "callbacks": RESAMPLING}
    whole = transcoder("whole", **settings)
    passes.train_jobs([whole])
    killed = replace(whole, folder=whole.folder.parent / "killed")
    stop_after(monkeypatch, 23, killed)
    resume(killed)
    assert_same(whole.folder, killed.folder)


@pytest.mark.slow
def test_a_cached_transcoder_is_the_live_one_and_other_sites_have_a_cache_of_their_own(
    transcoder, job, tmp_path, monkeypatch
):
    calls, capture = [], rows.capture
    monkeypatch.setattr(rows, "capture", lambda *args: calls.append(1) or capture(*args))

    def cached(one):
        folder = str(tmp_path / "activations")
        data = replace(one.config.data, cache=True, cache_folder=folder)
        return replace(one, config=replace(one.config, data=data))

    live, writing, reading = transcoder("live"), transcoder("writing"), transcoder("reading")
    passes.train_jobs([live])
    once = len(calls)
    passes.train_jobs([cached(writing)])
    assert len(calls) == 2 * once > 0
    passes.train_jobs([cached(reading)])
    assert len(calls) == 2 * once, "both sites are there"
    passes.train_jobs([cached(job("mlp", layer=LayerConfig(index=1, source=Kind.mlp)))])
    assert len(calls) == 3 * once
    assert weights(live.folder) == weights(writing.folder) == weights(reading.folder)
    assert metrics(live.folder)["held_out"] == metrics(reading.folder)["held_out"]
