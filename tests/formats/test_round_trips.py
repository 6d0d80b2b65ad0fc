"""What one format writes and is read, another writes and is read: for raw activations, it still
does what was trained."""

import json
from itertools import product

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_saved_format import (
    FEATURES,
    D,
    assert_agree,
    expect_output,
    normalisation,
    raw_activations,
)
from test_saved_format import trained as make_trained
from tiny_run import tiny_job, write_text

from sae_lightning import UserError, load_sae
from sae_lightning.analysis.export_task import ExportTask
from sae_lightning.formats.format import Origin
from sae_lightning.formats.saved_format import save_sae
from sae_lightning.formats.table import FORMATS
from sae_lightning.formats.trained_on import find_llm_name, find_origin, read_layer
from sae_lightning.formats.write_sae import WRITABLE, write_sae
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import Kind, LayerConfig
from sae_lightning.runs import folders
from sae_lightning.sae import ARCHITECTURES, SAE, Output, SAEConfig, build_sae
from sae_lightning.stream.plays import PlaysConfig

RESID = LayerConfig(index=3)
TRANSCODER = LayerConfig(index=3, source=Kind.mlp_in, target=Kind.mlp)
ALL = frozenset(ARCHITECTURES)
THRESHOLDED = frozenset({"relu", "dense", "jumprelu", "batch_topk", "matryoshka"})
# Format -> the architectures of autoencoders, and of transcoders, that it holds.
HOLDS = {
    "saelens": (ALL, ALL),
    "sparsify": ({"topk"}, {"topk"}),
    "dictionary_learning": (ALL, {}),
    "llamascopium": (THRESHOLDED | {"topk"}, THRESHOLDED | {"topk"}),
    "circuit_tracer": ({}, THRESHOLDED | {"topk"}),
}
SKIPS = {"saelens", "sparsify", "circuit_tracer"}


def test_every_format_that_is_written_is_tested():
    assert {*HOLDS} == {*WRITABLE}


def describe(layer: LayerConfig) -> Origin:
    return find_origin({"model_name": "EleutherAI/pythia-70m", "context_size": 128}, "run", layer)


def fold(sae: SAE) -> SAE:
    """The SAE for raw activations."""
    weights = sae.fold(*normalisation(len(sae.b_dec)))
    folded = build_sae(sae.config, len(sae.W_enc), len(sae.b_dec))
    folded.load_weights(weights)
    return folded


TRIPS = [(RESID, False), (TRANSCODER, False), (TRANSCODER, True)]
QUICK = [("topk", RESID, False), ("gated", RESID, False), ("batch_topk", TRANSCODER, True)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layer", "skip"),
    [
        pytest.param(name, *trip, marks=[] if (name, *trip) in QUICK else pytest.mark.slow)
        for name, trip in product(ARCHITECTURES, TRIPS)
    ],
)
def test_every_pair_of_formats(tmp_path, name, layer, skip):
    trained = make_trained(name, D, skip=skip)
    expected, kind = expect_output(trained), int(layer is TRANSCODER)
    for first in HOLDS:
        one = make(tmp_path / first)
        if name not in HOLDS[first][kind] or (skip and first not in SKIPS):
            assert_refused(first, fold(trained), describe(layer), one)
            continue
        write_sae(first, fold(trained), describe(layer), one)
        read = load_sae(one)
        assert_agree(read(raw_activations()), expected)
        origin = find_origin(read.metadata, "run", None)
        for second in HOLDS:
            other = make(tmp_path / f"{first}-{second}")
            if read.config.name not in HOLDS[second][kind] or (skip and second not in SKIPS):
                assert_refused(second, read, origin, other)
                continue
            write_sae(second, read, origin, other)
            again = load_sae(other)
            assert_agree(again(raw_activations()), expected)
            about = {key: value for key, value in again.metadata.items() if isinstance(value, str)}
            assert read_layer(about, "run").resolve_sites(9) == layer.resolve_sites(9)
            assert find_llm_name(about, "run") == "EleutherAI/pythia-70m"


def assert_refused(name, sae, origin, folder):
    with pytest.raises(UserError, match=rf"^format={name} has no .* choose another"):
        write_sae(name, sae, origin, folder)
    assert list(folder.iterdir()) == []


def make(folder):
    folder.mkdir(parents=True)
    return folder


def encode_topk(x, theirs, k):
    """The k largest of relu(encoder(x - b_dec))."""
    z = (x - theirs["b_dec"]) @ theirs["encoder.weight"].T + theirs["encoder.bias"]
    values, places = z.relu().topk(k)
    return torch.zeros(len(x), FEATURES).scatter(1, places, values)


@torch.no_grad()
def test_what_the_other_tools_compute_from_what_is_written(tmp_path):
    """The equations of sparsify and dictionary_learning, from the files alone."""
    sae, x = fold(make_trained("topk")), raw_activations()
    write_sae("sparsify", sae, describe(RESID), tmp_path)
    write_sae("dictionary_learning", sae, describe(RESID), tmp_path)
    theirs = load_file(tmp_path / "sae.safetensors")
    k = json.loads((tmp_path / "cfg.json").read_text())["k"]
    features = encode_topk(x, theirs, k)
    assert_agree(sae(x), Output(features @ theirs["W_dec"] + theirs["b_dec"], features))
    theirs = torch.load(tmp_path / "ae.pt", weights_only=True)
    features = encode_topk(x, theirs, theirs["k"].item())
    decoded = features @ theirs["decoder.weight"].T + theirs["b_dec"]
    assert_agree(sae(x), Output(decoded, features))
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "trainer": {
            "dict_class": "AutoEncoderTopK",
            "activation_dim": D,
            "dict_size": FEATURES,
            "lm_name": "EleutherAI/pythia-70m",
            "layer": 3,
            "submodule_name": "resid_post_layer_3",
            "k": 7,
        },
        "buffer": {"ctx_len": 128},
    }


def test_different_thresholds_are_no_batch_topk_of_dictionary_learning(tmp_path):
    sae = fold(make_trained("batch_topk"))
    sae.threshold[1] += 0.5
    with pytest.raises(UserError, match="stores one threshold in a BatchTopKSAE, and the features"):
        write_sae("dictionary_learning", sae, describe(RESID), tmp_path)


@pytest.mark.parametrize("features", [1, 7, 49, 10_000])
def test_llamascopium_computes_the_number_of_features_that_there_are(tmp_path, features):
    sae = build_sae(SAEConfig(features=features), 3, 3)
    write_sae("llamascopium", sae, describe(RESID), tmp_path)
    cfg = json.loads((tmp_path / "config.json").read_text())
    assert int(cfg["d_model"] * cfg["expansion_factor"]) == features
    assert cfg["hook_point_in"] == cfg["hook_point_out"] == "blocks.3.hook_resid_post"


def test_an_sae_of_two_widths_is_refused(tmp_path):
    sae = fold(make_trained("topk", 7))
    with pytest.raises(UserError, match="format=sparsify has one width .* reads 16 .* writes 7"):
        write_sae("sparsify", sae, describe(TRANSCODER), tmp_path)


def test_a_site_that_is_given_replaces_the_one_in_the_metadata():
    said = {"hook_name": "blocks.1.hook_resid_post", "hf_hook_name": "model.layers.1"}
    assert find_origin(said, "run", None).metadata == said
    assert find_origin(said, "run", TRANSCODER).metadata == {
        "hook_name": "blocks.3.mlp.hook_in",
        "hook_name_out": "blocks.3.hook_mlp_out",
    }


def test_a_site_before_the_norms_gain_keeps_its_name():
    """It is not the MLP's input, which formats that need a site would be told."""
    said = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    origin = find_origin(said, "run", None)
    assert (origin.metadata, origin.sites) == (said, None)
    with pytest.raises(UserError, match="without the norm's gain"):
        origin.require_sites()


def test_a_site_that_is_not_known_is_asked_for_only_where_it_is_written(tmp_path):
    sae, unknown = fold(make_trained("topk")), find_origin({}, "mine", None)
    for name in ("saelens", "sparsify", "dictionary_learning"):
        write_sae(name, sae, unknown, make(tmp_path / name))
        assert "hook_name" not in load_sae(tmp_path / name).metadata
    with pytest.raises(UserError, match="^mine does not say where its SAE reads: give the site"):
        write_sae("llamascopium", sae, unknown, tmp_path)


@pytest.fixture
def sweep(tiny_folder, tmp_path):
    """A sweep of transcoders, one for each block of a tiny LLM."""
    write_text(tmp_path)
    for index in range(3):
        add_run(tmp_path, tiny_folder("llama"), f"layer.index={index}", index)
    return tmp_path / "sweep"


def add_run(root, llm, name, index, features=32):
    layer = LayerConfig(index=index, source=Kind.mlp_in, target=Kind.mlp)
    config = SAEConfig(features=features, skip=True, seed=index)
    folder = root / "sweep" / name
    folder.mkdir(parents=True)
    job = tiny_job(llm, root, folder, layer=layer, model=config)
    folders.begin_run(job)
    sae = build_sae(config, 24, 24)
    save_sae(folder / "sae", sae, sae.weights(), {"model_name": llm} | describe(layer).metadata)


def export_set(sweep, to, *given):
    groups = {"llm": LLMConfig(name="x"), "data": PlaysConfig(), "layer": RESID}
    task = {"task": "export", "format": "circuit_tracer", "to": str(to)}
    ExportTask(run=str(sweep), **task, **groups).execute(["run", "task", "format", "to", *given])


@torch.no_grad()
def test_a_sweep_of_transcoders_is_a_set(sweep, tmp_path, capsys):
    export_set(sweep, tmp_path / "set")
    assert "writing transcoders: done in" in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "set").iterdir()) == [
        *("config.yaml", "layer_0.safetensors", "layer_1.safetensors", "layer_2.safetensors"),
    ]
    assert yaml.safe_load((tmp_path / "set" / "config.yaml").read_text()) == {
        "model_kind": "transcoder_set",
        "model_name": "EleutherAI/pythia-70m",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": "pythia-70m-transcoders",
    }
    x = torch.randn(50, 24)
    for index in range(3):
        trained = load_sae(sweep / f"layer.index={index}")
        read = load_sae(tmp_path / "set" / f"layer_{index}.safetensors")
        assert torch.equal(read(x).reconstruction, trained(x).reconstruction)


def test_a_site_is_not_given_for_a_whole_set(sweep, tmp_path):
    """Every transcoder would be written as that block's."""
    with pytest.raises(UserError, match="layer.index has no meaning for a set"):
        export_set(sweep, tmp_path / "set", "layer.index")


def test_a_set_with_a_gap_says_which_blocks_are_missing(sweep, tmp_path):
    (sweep / "layer.index=1" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"no transcoder for 1 of 3 blocks, .* layer\.index=1$"):
        export_set(sweep, tmp_path / "set")
    with pytest.raises(UserError, match=r"no transcoder for 2 of 3 blocks, .* layer\.index=1,2$"):
        export_set(sweep / "layer.index=0", tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.slow
def test_a_set_has_one_transcoder_for_a_block_and_one_size(sweep, tiny_folder, tmp_path):
    add_run(tmp_path, tiny_folder("llama"), "second", 2)
    with pytest.raises(UserError, match="layer.index=2 and second both read block 2, and format="):
        export_set(sweep, tmp_path / "set")
    for name in ("second", "layer.index=2"):
        (sweep / name / "config.yaml").unlink()
    add_run(tmp_path, tiny_folder("llama"), "third", 2, features=40)
    with pytest.raises(UserError, match="model.features is 32 in one run and 40 in third, and m"):
        export_set(sweep, tmp_path / "set")


def test_a_set_is_made_of_runs(tmp_path):
    sae = fold(make_trained("relu"))
    save_sae(tmp_path / "sae", sae, sae.weights(), {})
    with pytest.raises(UserError, match="takes a transcoder for every block: give the folder of a"):
        export_set(tmp_path / "sae", tmp_path / "set")


def test_the_table_says_what_can_be_written():
    for name, (autoencoders, transcoders) in HOLDS.items():
        if name != "saelens":
            assert {*FORMATS[name].autoencoders} == {*autoencoders}
            assert {*FORMATS[name].transcoders} == {*transcoders}
