"""`model.start` on the command line: what comes from the start, and what may not contradict it."""

import sys
from pathlib import Path

import pytest
import torch
from hydra import compose

from sae_lightning import UserError
from sae_lightning.formats.saved_format import save_sae
from sae_lightning.llm.packaged import LLMShape
from sae_lightning.llm.sites import Kind, LayerConfig
from sae_lightning.runs.checks import _count_checkpoint_bytes
from sae_lightning.runs.cli import rewrite_command_line
from sae_lightning.runs.config import Config
from sae_lightning.runs.jobs import Job, format_config, make_job, read_job
from sae_lightning.runs.memory import estimate_memory
from sae_lightning.runs.starts import check_start, choose_architecture, forget_starts
from sae_lightning.sae import ARCHITECTURES, build_sae

D = 16

pytestmark = pytest.mark.usefixtures("hydra")


@pytest.fixture(autouse=True)
def forgotten():
    yield
    forget_starts()


@pytest.fixture
def save(tmp_path, monkeypatch):
    """save(name, architecture, settings, **metadata) -> an SAE in a folder of that name, in the
    working folder."""
    monkeypatch.chdir(tmp_path)

    def save(name, architecture, /, norms=None, own=False, target=None, **settings):
        if architecture == "topk":
            settings = {"k": 7} | settings
        config = ARCHITECTURES[architecture].config(name=architecture, features=40, **settings)
        sae = build_sae(config, D, D)
        if norms:
            sae.W_dec.data *= torch.linspace(*norms, 40)[:, None]
        said = {"model_name": "openai-community/gpt2", "hook_name": "blocks.3.hook_resid_post"}
        if target:
            said = said | {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": target}
        if own:
            said["sae_lightning"] = {"llm.name": "openai-community/gpt2", "llm.bos": "<s>"}
        save_sae(tmp_path / name, sae, sae.weights(), said)
        return name

    return save


def compose_start(*typed: str) -> Config:
    """The config of a command line."""
    arguments = choose_architecture(list(typed))
    return make_job(compose("config", arguments), Path("folder"), arguments).config


@pytest.mark.slow
def test_what_is_not_typed_comes_from_the_start(save, tmp_path):
    save("topk", "topk", k=7)
    config = compose_start("model.start=topk", "loss.auxk=0.1", "llm.batch=3")
    assert (config.model.name, config.model.features, config.model.k) == ("topk", 40, 7)
    assert config.layer == LayerConfig(index=3)
    assert (config.llm.name, config.llm.batch) == ("openai-community/gpt2", 3)
    assert config.model.start == str(tmp_path / "topk")
    assert config.loss.auxk == 0.1
    typed = compose_start("model.start=topk", "llm.bos=x").llm
    assert (typed.name, typed.bos) == ("openai-community/gpt2", "x")
    # what another tool's format does not tell is as in the preset
    assert config.model.decoder_norm == 1.0
    one = compose_start("model.start=topk", "model.k=3", "model.features=50", "layer.index=3")
    assert (one.model.k, one.model.features, one.layer.index) == (3, 50, 3)


@pytest.mark.slow
def test_settings_are_checked_with_what_comes_from_the_start(save):
    """The defaults would not fit: k=64, 10,000 features, no skip connection of an autoencoder."""
    save("topk", "topk", k=7)
    assert compose_start("model.start=topk", "model.features=50", "model.k=30").model.features == 50
    assert compose_start("model.start=topk").model.k == 7
    save("relu", "relu")
    with pytest.raises(UserError, match=r"target_l0=60.*: there are only model\.features=40; give"):
        compose_start("model.start=relu", "loss.target_l0=60")
    save("across", "relu", target="blocks.3.hook_mlp_out", skip=True)
    assert compose_start("model.start=across", "model.skip=true").layer.target is Kind.mlp


def test_the_settings_of_a_run_of_ours_are_all_taken(save):
    save("ours", "jumprelu", own=True, bandwidth=0.5, decoder_norm=0.3, seed=4)
    config = compose_start("model.start=ours", "model.bandwidth=0.7", "seed=2")
    assert (config.model.bandwidth, config.model.decoder_norm) == (0.7, 0.3)
    assert (config.model.seed, config.llm.bos) == (2, "<s>")


def test_new_features_join_the_last_group(save):
    save("nested", "matryoshka", own=True, k=4, groups=[0.25, 0.25])
    assert compose_start("model.start=nested").model.sizes() == [10, 10, 20]
    assert compose_start("model.start=nested", "model.features=64").model.sizes() == [10, 10, 44]


def test_a_transcoder_brings_its_sites_and_its_skip_connection(save):
    save("across", "relu", target="blocks.3.hook_mlp_out", skip=True)
    config = compose_start("model.start=across")
    assert config.layer == LayerConfig(index=3, source=Kind.mlp_in, target=Kind.mlp)
    assert config.model.skip
    compose_start("model.start=across", "layer=transcoder", "model.skip=true")


@pytest.mark.slow
def test_features_that_compete_keep_their_norms_if_these_differ(save):
    save("equal", "topk", norms=(1.0, 1.005))
    save("unequal", "topk", norms=(1.0, 3.0))
    save("gated", "gated", norms=(1.0, 3.0))
    assert compose_start("model.start=equal").model.fixed_norm
    assert not compose_start("model.start=unequal").model.fixed_norm
    assert compose_start("model.start=gated").model.fixed_norm


CONTRADICTIONS = {
    "model=relu": "model=relu: model.start=HERE/topk holds a topk SAE; leave model=... out, or "
    "choose another start",
    "model.features=39 model.k=7": "model.features=39: model.start=HERE/topk has 40 features; give "
    "as many or more, or leave it out",
    "layer.index=4": "layer.index=4: model.start=HERE/topk was trained at layer.index=3; leave it "
    "out, or choose another start",
    "layer=mlp": "layer.source=mlp: model.start=HERE/topk was trained at layer.source=resid; leave "
    "it out, or choose another start",
    "model.fixed_norm=true": "model.fixed_norm=true: the decoder rows of model.start=HERE/topk "
    "differ in norm by a factor of 3, and equal norms would change which features are the "
    "strongest; leave it out",
    "layer=transcoder model.skip=true": "layer.source=mlp_in: model.start=HERE/topk was trained at "
    "layer.source=resid; leave it out, or choose another start",
}


@pytest.mark.parametrize("typed", CONTRADICTIONS)
def test_what_contradicts_the_start_is_one_line(save, tmp_path, typed):
    save("topk", "topk", norms=(1.0, 3.0))
    with pytest.raises(UserError) as error:
        compose_start("model.start=topk", *typed.split())
    assert str(error.value) == CONTRADICTIONS[typed].replace("HERE", str(tmp_path))


def test_a_skip_connection_that_the_start_has_not_is_refused(save):
    save("across", "relu", target="blocks.3.hook_mlp_out", own=True)
    with pytest.raises(UserError, match=r"model\.skip=true: .*/across has no skip connection; le"):
        compose_start("model.start=across", "layer=transcoder", "model.skip=true")


def test_an_sae_that_does_not_say_its_site_needs_one_typed(save, tmp_path):
    save("mute", "relu")
    file = tmp_path / "mute" / "cfg.json"
    file.write_text(file.read_text().replace("blocks.3.hook_resid_post", "elsewhere"))
    with pytest.raises(UserError, match=r"which is not a known site: give the site with layer"):
        compose_start("model.start=mute")
    assert compose_start("model.start=mute", "layer.index=5").layer.index == 5


def test_an_llm_of_another_width_is_refused_and_another_llm_is_told(save, tmp_path):
    save("topk", "topk")
    right, wrong = (LLMShape(12, width, None, 0) for width in (D, 24))
    config, sites = compose_start("model.start=topk"), LayerConfig(index=3).resolve_sites(12)
    assert check_start(config, sites, right) is None
    with pytest.raises(UserError, match=r"topk is for activations of 16 dimensions, and those of "):
        check_start(config, sites, wrong)
    across = LayerConfig(index=0, source=Kind.mlp_in, target=Kind.mlp).resolve_sites(1)
    uneven = LLMShape(1, 24, None, 0, {across.source: D, across.target: 24})
    with pytest.raises(UserError, match="of 16 dimensions, and those of .* have 16 -> 24; choose"):
        check_start(config, across, uneven)
    other = compose_start("model.start=topk", "llm=pythia_70m")
    assert check_start(other, sites, right) == (
        f"model.start={tmp_path}/topk was trained on openai-community/gpt2, and goes on with "
        "EleutherAI/pythia-70m-deduped"
    )


@pytest.mark.slow
def test_reading_the_start_and_keeping_its_rows_is_counted(save, tmp_path):
    """n = 2 x 40 x 16 + 40 + 16 parameters: read in float32 in up to three copies, and decoder rows
    in half precision, in memory once and on disk twice."""
    save("relu", "relu")
    shape, sites = LLMShape(12, D, None, 0), LayerConfig(index=3).resolve_sites(12)
    ways = ("model.start=relu", "model.features=40")
    warm, cold = (compose_start("data=synthetic", way, "llm.dtype=float32") for way in ways)
    one, other = (estimate_memory([config], [sites], shape) for config in (warm, cold))
    n = 2 * 40 * D + 40 + D
    assert one.shared_parts["model.features",] - other.shared_parts["model.features",] == 12 * n
    assert one.head_bytes[0] - other.head_bytes[0] == n
    jobs = [Job(config=config, folder=tmp_path / "none") for config in (warm, cold)]
    needed = [_count_checkpoint_bytes(job, sites, shape) for job in jobs]
    assert needed[0] - needed[1] == 2 * 2 * 40 * D


def test_the_random_rows_of_a_soft_frozen_decoder_are_counted():
    """40 x 16 in float32."""
    typed = ("data=synthetic", "model.features=40", "llm.dtype=float32")
    shape, sites = LLMShape(12, D, None, 0), LayerConfig(index=3).resolve_sites(12)
    one, other = (
        estimate_memory(
            [compose_start(*typed, f"model.control={kind}")],
            [sites],
            shape,
        )
        for kind in ("soft_frozen_decoder", "frozen_decoder")
    )
    assert one.head_bytes[0] - other.head_bytes[0] == 4 * 40 * D
    assert one.shared_parts == other.shared_parts


def test_nothing_at_the_start_is_one_line(save, tmp_path):
    with pytest.raises(UserError, match=r"^model\.start=[^ ]*/none: no such folder or file"):
        compose_start("model.start=none")


@pytest.mark.parametrize(
    ("typed", "added"),
    [
        ("model.start=topk", ["model=topk"]),
        ("-m model.start=null,topk", ["model=topk"]),
        ("-m model.start=topk,second loss.auxk=0,1", ["model=topk"]),
        ("-m model.start=choice(topk,second)", ["model=topk"]),
        ("model=topk model.start=topk", []),
        ("model.start=null", []),
        ("seed=3", []),
        ("resume=run model.start=topk", []),
    ],
)
def test_the_architecture_of_the_start_is_chosen_before_anything_is_composed(
    save, monkeypatch, typed, added
):
    save("topk", "topk")
    save("second", "topk", k=3)
    monkeypatch.setattr(sys, "argv", ["train.py", *typed.split()])
    rewrite_command_line()
    assert [a for a in sys.argv[1:] if a not in typed.split()] == added


def test_a_start_that_has_changed_since_the_last_command_is_read_again(save):
    save("one", "topk", k=3)
    assert compose_start("model.start=one").model.k == 3
    save("one", "topk", k=5)
    assert compose_start("model.start=one").model.k == 5


def test_starts_of_several_architectures_are_refused(save, tmp_path):
    save("topk", "topk")
    save("relu", "relu")
    with pytest.raises(UserError) as error:
        choose_architecture(["-m", "model.start=topk,relu"])
    assert str(error.value) == (
        "model.start: topk (topk) and relu (relu) have different architectures, and a command "
        "has one: give a command for each"
    )


def test_a_run_folder_from_before_opens_and_a_new_one_keeps_its_start(save, tmp_path):
    save("topk", "topk")
    arguments = choose_architecture(["model.start=topk"])
    job = make_job(compose("config", arguments), tmp_path / "run", arguments)
    job.folder.mkdir()
    text = format_config(job)
    (job.folder / "config.yaml").write_text(text)
    assert read_job(job.folder).config == job.config
    old = "\n".join(line for line in text.splitlines() if not line.startswith("  start:"))
    (job.folder / "config.yaml").write_text(old)
    assert read_job(job.folder).config.model.start is None
