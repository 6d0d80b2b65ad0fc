"""An SAE is opened from whatever folder it lies in, with the LLM, site and text that it reads."""

import json
import shutil

import pytest
import torch
from planted import save_planted
from safetensors.torch import load_file
from tiny_run import tiny_job, write_text

from sae_lightning.analysis.subject import open_subject
from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import Kind, LayerConfig, Site
from sae_lightning.runs import folders
from sae_lightning.runs.search import SweepConfig
from sae_lightning.sae import SAEConfig
from sae_lightning.stream.local import LocalConfig
from sae_lightning.stream.plays import PlaysConfig
from sae_lightning.stream.synthetic import SyntheticConfig


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Folders of an LLM and of an SAE that says so."""
    return save_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def sae(planted, tmp_path):
    """A copy of the SAE's folder, to be changed."""
    return shutil.copytree(planted[1], tmp_path / "bare")


@pytest.fixture
def run(planted, tmp_path):
    """A run folder with the SAE in it."""
    write_text(tmp_path)
    job = tiny_job(str(planted[0]), tmp_path, tmp_path / "run", model=SAEConfig(features=32))
    folders.begin_run(job)
    shutil.copytree(planted[1], job.folder / "sae")
    return job.folder


def small_text(folder):
    """Three documents."""
    (folder / "text").mkdir()
    return LocalConfig(path=str(write_text(folder / "text")))


def asked(folder, **settings):
    """What `analyze.py` is asked, as the presets have it."""
    defaults = {
        "llm": LLMConfig(name="smollm2"),
        "data": PlaysConfig(),
        "layer": LayerConfig(index=9),
    }
    return str(folder), {"seed": 0} | defaults | settings


def rewrite(folder, **metadata):
    """Change what cfg.json says the SAE was trained on; None takes a key out."""
    cfg = json.loads((folder / "cfg.json").read_text())
    said = cfg["metadata"] | metadata
    cfg["metadata"] = {key: value for key, value in said.items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(cfg))


def synthetic(run, folder):
    """Make of a run one that was trained on concepts."""
    job = tiny_job("not read", folder, run, model=SAEConfig(features=32))
    data = SyntheticConfig(concepts=64, dim=24)
    job.config.llm, job.config.data = LLMConfig(name="none"), data
    job.config.layer, job.config.sweep = LayerConfig(index=0), SweepConfig(objective="recovered")
    folders.begin_run(job)


@pytest.mark.parametrize("inside", ["", "sae"])
def test_a_run_says_what_its_sae_reads(run, planted, inside):
    subject = open_subject(*asked(run / inside))
    assert subject.folder == run
    assert subject.config.llm.name == str(planted[0])
    assert isinstance(subject.config.data, LocalConfig)
    assert subject.sites.source == Site(1, Kind.resid)


def test_what_is_given_counts_more_than_what_the_run_says(run, planted):
    other = asked(
        run,
        llm=LLMConfig(name=str(planted[0]), batch=3, device="cpu"),
        data=PlaysConfig(context=7),
        layer=LayerConfig(index=2),
        seed=5,
    )
    one = open_subject(*other, ["llm.batch"]).config
    assert (one.llm.batch, one.seed, one.layer.index) == (3, 0, 1)
    assert isinstance(one.data, LocalConfig)
    assert open_subject(*other, ["data.context"]).config.data.context == 7
    every = open_subject(*other, ["llm", "data", "layer.index", "seed"]).config
    assert (every.llm, every.data, every.layer, every.seed) == (
        other[1]["llm"],
        other[1]["data"],
        LayerConfig(index=2),
        5,
    )
    spread = asked(run, llm=LLMConfig(name="gpt2", device="cpu", load={"device_map": "cpu"}))
    one = open_subject(*spread, ["llm.load.device_map"]).config.llm
    assert (one.name, one.load) == (str(planted[0]), {"device_map": "cpu"})
    with pytest.raises(UserError, match=r"data\.held_out_split is no setting of .* data=\.\.\."):
        open_subject(*other, ["data.held_out_split"])


def test_an_sae_in_a_file_has_results_beside_it(sae, planted):
    tensors = load_file(sae / "sae_weights.safetensors")
    names = {"W_enc": "encoder_linear.weight", "W_dec": "decoder_linear.weight"}
    names |= {"b_enc": "encoder_linear.bias", "b_dec": "decoder_linear.bias"}
    file = sae / "tiny-SAE-l2.pth"
    torch.save({names[name]: x.T if x.ndim > 1 else x for name, x in tensors.items()}, file)
    asked_for = asked(file, llm=LLMConfig(name=str(planted[0])), data=PlaysConfig(context=16))
    subject = open_subject(*asked_for, ["llm", "data.context"])
    assert subject.sites.source == Site(2, Kind.resid)
    assert subject.results_folder == sae / "tiny-SAE-l2.pth-analysis"


def test_an_sae_alone_says_where_it_was_trained(sae, planted):
    subject = open_subject(*asked(sae, data=PlaysConfig(keep_special=True)))
    assert subject.folder == sae
    assert subject.config.llm.name == str(planted[0])
    assert subject.sites == (Site(1, Kind.resid), Site(1, Kind.resid))
    # the text is the one that is asked for, cut as in training
    assert (subject.config.data.context, subject.config.data.keep_special) == (16, True)
    text = open_subject(*asked(sae, data=small_text(sae.parent))).corpus
    assert text.train.packing.context == 16
    given = open_subject(*asked(sae, data=PlaysConfig(context=9)), ["data.context"])
    assert given.config.data.context == 9


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.2.hook_resid_post", Site(2, Kind.resid)),
        ("blocks.2.hook_resid_pre", Site(1, Kind.resid)),  # the output of the block before
        ("blocks.0.hook_attn_out", Site(0, Kind.attn)),
        ("blocks.1.hook_mlp_out", Site(1, Kind.mlp)),
        ("blocks.1.ln2.hook_normalized", Site(1, Kind.mlp_in)),
        ("model.layers.2", Site(2, Kind.resid)),
        ("transformer.h.1", Site(1, Kind.resid)),
        ("model.layers.2.mlp", Site(2, Kind.mlp)),
        ("blocks.1.mlp.hook_in", Site(1, Kind.mlp_in)),
        ("resid_post_layer_2", Site(2, Kind.resid)),
    ],
)
def test_places_are_known_by_the_names_of_other_tools(sae, hook, site):
    rewrite(sae, hook_name=hook)
    assert open_subject(*asked(sae)).sites.source == site


def test_a_transcoder_alone_has_two_sites(sae, capsys):
    rewrite(sae, hook_name="blocks.1.mlp.hook_in", hook_name_out="blocks.1.hook_mlp_out")
    assert open_subject(*asked(sae)).sites == (Site(1, Kind.mlp_in), Site(1, Kind.mlp))
    assert "gain" not in capsys.readouterr().out
    rewrite(sae, hook_name="blocks.1.ln2.hook_normalized")
    assert open_subject(*asked(sae)).sites == (Site(1, Kind.mlp_in), Site(1, Kind.mlp))
    told = " ".join(capsys.readouterr().out.split())
    assert "bare reads blocks.1.ln2.hook_normalized, the MLP's input without the norm's" in told
    rewrite(sae, hook_name_out="blocks.2.hook_mlp_out")
    with pytest.raises(UserError, match="reads block 1 and writes block 2"):
        open_subject(*asked(sae))


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("gpt2-small", "gpt2"),
        ("pythia-70m", "EleutherAI/pythia-70m"),
        ("owner/mine", "owner/mine"),
        ("Qwen/Qwen9-0.6B", "Qwen/Qwen9-0.6B"),
        ("gpt2-mine/gpt2", "gpt2-mine/gpt2"),
    ],
)
def test_llms_are_known_by_transformerlens_names(sae, said, name):
    rewrite(sae, model_name=said)
    with pytest.raises(UserError, match=f"llm.name={name}: not a local folder"):
        open_subject(*asked(sae))


def test_a_runs_own_settings_name_its_llm_better_than_the_name_for_others(sae, planted):
    own = {"llm.name": str(planted[0]), "llm.separator": "the", "llm.bos": None}
    rewrite(sae, model_name="owner/mine", sae_lightning=own)
    llm = open_subject(*asked(sae)).config.llm
    assert (llm.name, llm.bos, llm.separator) == (str(planted[0]), None, "the")
    rewrite(sae, sae_lightning=own | {"llm.name": "owner/mine", "llm.revision": "v1"})
    with pytest.raises(UserError, match=r"^llm\.(name=owner/mine|revision=v1): "):
        open_subject(*asked(sae))
    rewrite(sae, sae_lightning=own | {"llm.name": 3})
    with pytest.raises(UserError, match=r"bare: llm\.name=3 in its metadata is not of type str"):
        open_subject(*asked(sae))
    rewrite(sae, sae_lightning=["llm.name"])
    with pytest.raises(UserError, match="owner/mine: not a local folder"):
        open_subject(*asked(sae))


def test_an_sae_of_synthetic_activations_needs_its_run_folder(sae):
    """The exported SAE names no data, and analyze.py takes no data=synthetic."""
    rewrite(sae, model_name="none")
    with pytest.raises(UserError) as error:
        open_subject(*asked(sae))
    assert str(error.value) == (
        f"{sae} was trained on activations without an LLM, and does not say where they are: give "
        "the run folder that it is from, or, if an LLM made them, name it and a text with llm=... "
        "data=... layer.index=..."
    )


def test_text_needs_an_llm(sae):
    with pytest.raises(UserError, match="^llm=none: text needs an LLM to read it; choose one$"):
        open_subject(*asked(sae, llm=LLMConfig(name="none")), ["llm"])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model_name": None}, r".*bare does not say which LLM its SAE reads: give llm=\.\.\."),
        (
            {"hook_name": None},
            r".*bare does not say where its SAE reads: give the site with layer=",
        ),
        ({"hook_name": "blocks.1.attn.hook_z"}, ".*reads blocks.1.attn.hook_z, which is not"),
        ({"hook_name": "blocks.0.hook_resid_pre"}, ".*reads blocks.0.hook_resid_pre, which is not"),
        ({"hook_name": "blocks.7.hook_resid_post"}, r"layer\.index=7: this LLM has 3 blocks"),
        ({"hook_name": f"blocks.{'9' * 5000}.hook_resid_post"}, ".*reads blocks.999"),
        (
            {"hook_name": ["blocks.1"]},
            r".*hook_name=\['blocks.1'\] in its metadata is not of type str",
        ),
        ({"hook_name_out": True}, ".*bare: hook_name_out=True in its metadata is not of type str"),
        (
            {"model_name": {"a": 1}},
            ".*bare: model_name={'a': 1} in its metadata is not of type str",
        ),
        ({"context_size": "128"}, ".*bare: context_size='128' in its metadata is not of type int"),
        ({"context_size": 1e400}, ".*bare: context_size=inf in its metadata is not of type int"),
    ],
)
def test_what_a_folder_does_not_say_is_asked_for(sae, metadata, message):
    rewrite(sae, **metadata)
    with pytest.raises(UserError, match=message):
        open_subject(*asked(sae))


def test_what_is_missing_can_be_given(sae, planted):
    rewrite(sae, model_name=None, hook_name=None)
    settings = {"llm": LLMConfig(name=str(planted[0])), "layer": LayerConfig(index=2)}
    subject = open_subject(*asked(sae, **settings), ["llm.name", "layer.index"])
    assert subject.sites.source == Site(2, Kind.resid)


def test_an_llm_of_another_width_is_refused_before_it_is_loaded(sae):
    with pytest.raises(UserError, match=r"llm.name=smollm2: .* 576 dimensions, .* reads 24"):
        open_subject(*asked(sae), ["llm"])


def test_a_device_that_is_not_there_is_refused_at_once(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    settings = {"llm": LLMConfig(name="smollm2", device="cuda:3")}
    with pytest.raises(UserError, match="llm.device=cuda:3: this machine has no CUDA device"):
        open_subject(*asked(run, **settings), ["llm.device"])


def test_a_feature_that_is_not_there_is_refused(sae):
    subject = open_subject(*asked(sae))
    assert subject.check_features([0, 31]) == [0, 31]
    with pytest.raises(UserError, match=r"feature=32: this SAE has 32 features; give 0 to 31"):
        subject.check_features([3, 32])


def test_concepts_have_no_text(run, tmp_path):
    synthetic(run, tmp_path)
    with pytest.raises(UserError, match="synthetic concepts and names no LLM: only task=evaluate"):
        _ = open_subject(*asked(run)).llm


def test_sequences_that_the_llm_cannot_read_are_refused(run):
    with pytest.raises(UserError, match=r"data\.context=33: .* takes at most 32 tokens"):
        open_subject(*asked(run, data=PlaysConfig(context=33)), ["data.context"])


def test_a_set_of_transcoders_is_no_run(tmp_path):
    """circuit-tracer's settings have the name of a run's."""
    (tmp_path / "config.yaml").write_text("model_kind: transcoder_set")
    for layer in range(2):
        (tmp_path / f"layer_{layer}.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="holds 2 SAEs: give one of the files"):
        open_subject(*asked(tmp_path))


def test_no_folder_at_all_is_told(run):
    with pytest.raises(UserError, match="run is empty: give a run folder"):
        open_subject(*asked(""))


def test_concepts_are_not_replaced_by_text(run, tmp_path):
    synthetic(run, tmp_path)
    with pytest.raises(UserError, match=r"data=\.\.\. has no meaning for .*run, which was trained"):
        open_subject(*asked(run), ["data"])


def test_a_heading_says_what_is_looked_at(run, tmp_path):
    assert open_subject(*asked(run)).heading == "llm, resid.1: 32 relu features"
    synthetic(run, tmp_path)
    assert open_subject(*asked(run)).heading == "synthetic concepts: 32 relu features"
