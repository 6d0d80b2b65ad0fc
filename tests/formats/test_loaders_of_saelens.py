"""SAELens' own loaders of other formats read the same files, and compute the same."""

import json
import math

import pytest
import torch
import yaml
from forked import run_script
from test_formats import BY_HAND
from test_round_trips import RESID, TRANSCODER, describe, fold, make
from test_saved_format import FEATURES, D, assert_agree, raw_activations
from test_saved_format import trained as make_trained

from sae_lightning import load_sae
from sae_lightning.formats.trained_on import read_layer
from sae_lightning.formats.write_sae import write_sae
from sae_lightning.sae import Output

pytestmark = pytest.mark.slow

# Reads cases [name, root, repo, folder, settings, factor], and runs the loaders on local files.
SCRIPT = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders

cases, results = json.loads(Path(sys.argv[1]).read_text()), {}
with torch.no_grad():
    for name, loader, root, repo, folder, settings, factor in cases:
        def find(repo_id, filename, subfolder="", **options):
            return str(Path(root, subfolder, filename))
        loaders.hf_hub_download = find
        loaders.get_safetensors_tensor_shapes = lambda repo_id, filename: {
            key: list(tensor.shape) for key, tensor in load_file(find(repo_id, filename)).items()
        }
        load = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader]
        cfg, weights, _ = load(repo, folder, "cpu", False, settings | {"dtype": "float32"})
        cfg = loaders.handle_config_defaulting(cfg)
        kind = SAE.get_sae_class_for_architecture(cfg["architecture"])
        sae = kind(SAE.get_sae_config_class_for_architecture(cfg["architecture"]).from_dict(cfg))
        sae.process_state_dict_for_loading(weights)
        sae.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
        if factor:
            sae.fold_activation_norm_scaling_factor(factor)
        x = torch.load(Path(sys.argv[1]).with_name(f"x{cfg['d_in']}.pt"))
        about = sae.cfg.metadata
        results[name] = (sae(x), sae.encode(x), about.model_name, about.hook_name)
torch.save(results, sys.argv[2])
"""
SMALL = {"d_in": 2, "d_sae": 3}
SIZE = {"d_in": D, "d_sae": FEATURES}
GEMMA, L16K = "gemma-scope-2b-pt", "layer_20/width_16k/average_l0_71"
AFFINE, LLAMA = "transcoder_all/layer_5_width_16k_l0_big_affine", "Llama3_1-8B-Base-L8R-8x"
QWEN, GOODFIRE = "SAE-Res-Qwen3-8B-Base-W64K-L0_1", "Llama-3.1-8B-Instruct-SAE-l19"
# Case -> format, SAELens' loader, what is below the root, repository, folder, settings, factor.
SUITES = {
    "gemma_scope": ("gemma_2", f"{GEMMA}-res", f"google/{GEMMA}-res", L16K, SMALL),
    "gemma_scope_2": ("gemma_3", "", "google/gemma-scope-2-270m-pt", AFFINE, SMALL | {"d_out": 2}),
    "llama_scope": ("llama_scope", "", "fnlp/Llama3_1-8B-Base-LXR-8x", LLAMA, SMALL),
    "qwen_scope": ("qwen_scope", QWEN, f"Qwen/{QWEN}", "layer6.sae.pt", SMALL),
    "goodfire": ("goodfire", "", f"Goodfire/{GOODFIRE}", f"{GOODFIRE}.pth", SMALL),
}
# Llama Scope's settings in test_formats.py have two factors; SAELens folds one.
ONE_FACTOR = {"dataset_average_activation_norm": {"in": math.sqrt(2) / 2, "out": math.sqrt(2) / 2}}
DICTIONARIES = ("topk", "batch_topk", "matryoshka", "jumprelu", "gated")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What SAELens computes from each file: one process, as importing it takes most of the time."""
    root, cases = tmp_path_factory.mktemp("loaders"), []
    for name, (loader, below, repo, folder, settings) in SUITES.items():
        file = BY_HAND[name][0](make(root / name))
        factor = 0
        if name == "llama_scope":
            hyperparams = file.parent.with_name("hyperparams.json")
            cfg = json.loads(hyperparams.read_text())
            hyperparams.write_text(json.dumps(cfg | ONE_FACTOR))
            factor = 2
        cases.append((name, loader, str(root / name / below), repo, folder, settings, factor))
    for name in DICTIONARIES:
        folder = make(root / "dictionaries" / name)
        write_sae("dictionary_learning", fold(make_trained(name)), describe(RESID), folder)
        cases.append((name, "dictionary_learning_1", str(folder.parent), "r", name, SIZE, 0))
    folder = make(root / "set")
    write_sae("circuit_tracer", fold(make_trained("relu")), describe(TRANSCODER), folder)
    sizes = {"d_model": D, "d_feature": FEATURES, "batch_size": 128}
    wandb = {key: {"value": value} for key, value in sizes.items()}
    (folder / "wandb-config.yaml").write_text(yaml.safe_dump(wandb))
    file = "layer_3.safetensors"
    cases.append(("set", "mwhanna_transcoder", str(folder), "r", file, SIZE | {"d_out": D}, 0))
    (root / "cases.json").write_text(json.dumps(cases))
    torch.save(small_activations(), root / "x2.pt")
    torch.save(raw_activations(), root / f"x{D}.pt")
    paths = [str(root / "cases.json"), str(root / "results.pt")]
    (root / "run.py").write_text(SCRIPT)
    done = run_script(str(root / "run.py"), *paths, cwd=root)
    assert done.returncode == 0, done.stderr
    return root, torch.load(root / "results.pt")


def small_activations():
    return torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) * 2 + 1


@torch.no_grad()
@pytest.mark.parametrize("name", SUITES)
def test_a_suite(results, name):
    root, computed = results
    reconstruction, features, model, hook = computed[name]
    _, below, _, folder, _ = SUITES[name]
    sae = load_sae(root / name / below / folder)
    assert_agree(sae(small_activations()), Output(reconstruction, features))
    assert sae.metadata["model_name"].split("/")[-1] == model.split("/")[-1]
    assert read_layer(sae.metadata, "run").index == int(hook.split(".")[1])


@torch.no_grad()
@pytest.mark.parametrize("name", [*DICTIONARIES, "set"])
def test_what_is_written_for_others_is_read_by_saelens(results, name):
    _, computed = results
    reconstruction, features, model, hook = computed[name]
    trained = fold(make_trained("relu" if name == "set" else name))
    assert_agree(Output(reconstruction, features), trained(raw_activations()))
    assert model.split("/")[-1] == "pythia-70m"
    assert hook == ("blocks.3.mlp.hook_in" if name == "set" else "blocks.3.hook_resid_post")
