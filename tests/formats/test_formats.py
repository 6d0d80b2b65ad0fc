"""Every row of the table reads a tiny folder that is written by hand, with numbers worked out here:

x = [3, 1];  x W_enc + b_enc = [3.5, -1, 5];  norms of decoder rows: 1, 2, sqrt(2)
"""

import json
import math
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sae_lightning import UserError, load_sae
from sae_lightning.formats.table import FORMATS, find_format, find_saes
from sae_lightning.formats.trained_on import find_llm_name, read_layer
from sae_lightning.llm.sites import Kind, LayerConfig
from sae_lightning.sae import ARCHITECTURES

X = torch.tensor([[3.0, 1.0]])
W_ENC = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
B_ENC = torch.tensor([0.5, -2.0, 0.0])
W_DEC = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
B_DEC = torch.tensor([0.25, -0.5])
SKIP = torch.tensor([[0.0, 1.0], [2.0, 0.0]])  # x SKIP = [2, 3]
LINEAR = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
RELU = [3.5, 0, 5], [8.75, 4.5]  # 3.5 [1, 0] + 5 [1, 1] + b_dec
THIRD = [0, 0, 5], [5.25, 4.5]  # 5 [1, 1] + b_dec


def write(file: Path, tensors: dict[str, torch.Tensor], **settings) -> Path:
    """Write a weights file, and settings into the file `beside` it, or above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if file.suffix == ".npz":
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        (save_file if file.suffix == ".safetensors" else torch.save)(tensors, file)
    if name := settings.pop("beside", None):
        (file.parent / name).resolve().write_text(json.dumps(settings))
    return file


def saelens(root: Path) -> Path:
    tensors = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    about = {"model_name": "gemma-2-2b", "hook_name": "blocks.4.hook_mlp_out"}
    cfg = {"architecture": "standard", "apply_b_dec_to_input": False, "metadata": about}
    return write(root / "sae" / "sae_weights.safetensors", tensors, beside="cfg.json", **cfg)


def sparsify(root: Path) -> Path:
    """The k largest of relu(x W_enc + b_enc) for a transcoder; x W_skip^T is added."""
    (root / "config.json").write_text('{"model": "EleutherAI/pythia-70m", "ctx_len": 64}')
    tensors = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    tensors["W_skip"] = SKIP.T
    file, cfg = root / "layers.2.mlp" / "sae.safetensors", {"k": 1, "transcode": True}
    return write(file, tensors, beside="cfg.json", **cfg)


def dictionary_learning(root: Path) -> Path:
    trainer = {"dict_class": "AutoEncoderNew", "lm_name": "EleutherAI/pythia-70m", "layer": 3}
    tensors = LINEAR | {"decoder.bias": B_DEC}
    file = root / "trainer_0" / "ae.pt"
    return write(file, tensors, beside="config.json", trainer=trainer, buffer={"ctx_len": 64})


def gemma_scope(root: Path) -> Path:
    """z 1[z > threshold], z = x W_enc + b_enc."""
    tensors = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    tensors["threshold"] = torch.tensor([4.0, 0.1, 4.0])
    folder = root / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    return write(folder / "params.npz", tensors)


def gemma_scope_2(root: Path) -> Path:
    """The same, and x affine_skip_connection is added."""
    tensors = {"w_enc": W_ENC, "b_enc": B_ENC, "w_dec": W_DEC, "b_dec": B_DEC}
    tensors |= {"threshold": torch.tensor([4.0, 0.1, 4.0]), "affine_skip_connection": SKIP}
    cfg = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-270m-pt",
        "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
        "affine_connection": True,
    }
    folder = root / "transcoder_all" / "layer_5_width_16k_l0_big_affine"
    return write(folder / "params.safetensors", tensors, beside="config.json", **cfg)


def llama_scope(root: Path) -> Path:
    """Mean norms sqrt(2)/2 and sqrt(2)/4 scale x by 2 and x_hat by 4:  z = 2 x W_enc + b_enc =
    [6.5, 0, 10] fires above 3.3 x 2;  x_hat = (10 [1, 1] + b_dec) / 4."""
    cfg = {
        "d_model": 2,
        "d_sae": 3,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 3.3,
        "dataset_average_activation_norm": {"in": math.sqrt(2) / 2, "out": math.sqrt(2) / 4},
        "hook_point_in": "blocks.8.hook_resid_post",
        "hook_point_out": "blocks.8.hook_resid_post",
        "top_k": 50,
    }
    tensors = LINEAR | {"decoder.bias": B_DEC}
    file = root / "Llama3_1-8B-Base-L8R-8x" / "checkpoints" / "final.safetensors"
    return write(file, tensors, beside="../hyperparams.json", **cfg)


def llamascopium(root: Path) -> Path:
    """Fires where z times the decoder norm, [3.5, -2, 5 sqrt(2)], exceeds 6."""
    log_threshold = torch.full((3,), 6.0).log()
    tensors = {"W_E": W_ENC, "b_E": B_ENC, "W_D": W_DEC, "b_D": B_DEC}
    tensors["activation_function.log_jumprelu_threshold"] = log_threshold
    # written also where it is not known
    tensors["dataset_average_activation_norm.blocks.7.hook_resid_post"] = torch.tensor(torch.nan)
    cfg = {
        "sae_type": "sae",
        "d_model": 2,
        "expansion_factor": 1.5,
        "act_fn": "jumprelu",
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": True,
        "hook_point_in": "blocks.7.hook_resid_post",
        "hook_point_out": "blocks.7.hook_resid_post",
        "model_name": "Qwen/Qwen3-1.7B",
    }
    return write(root / "sae" / "sae_weights.safetensors", tensors, beside="config.json", **cfg)


def circuit_tracer(root: Path) -> Path:
    """relu(W_enc x + b_enc) above the threshold; W_skip x is added."""
    tensors = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    tensors |= {"W_skip": SKIP.T, "activation_function.threshold": torch.full((3,), 4.0)}
    (root / "set").mkdir()
    (root / "set" / "config.yaml").write_text(
        "model_name: google/gemma-2-2b\nmodel_kind: transcoder_set\n"
        "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\nscan: null\n"
    )
    write(root / "set" / "layer_10.safetensors", tensors)
    return write(root / "set" / "layer_1.safetensors", tensors)


def qwen_scope(root: Path) -> Path:
    """The largest of relu(W_enc x + b_enc); k is in the repository's name."""
    tensors = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC.T, "b_dec": B_DEC}
    return write(root / "SAE-Res-Qwen3-8B-Base-W64K-L0_1" / "layer6.sae.pt", tensors)


def goodfire(root: Path) -> Path:
    tensors = {name.replace(".", "_linear."): tensor for name, tensor in LINEAR.items()}
    file = root / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    return write(file, tensors | {"decoder_linear.bias": B_DEC})


TRANSCODED = [0, 0, 5], [7.25, 7.5]  # 5 [1, 1] + b_dec + [2, 3]
LLAMA = "meta-llama/Llama-3.1-8B"
TRANSCODER = {"source": Kind.mlp_in, "target": Kind.mlp}
# Row -> how it is written; features and reconstruction of x; architecture; LLM; site.
BY_HAND = {
    "saelens": (saelens, RELU, "relu", "google/gemma-2-2b", LayerConfig(index=4, source=Kind.mlp)),
    "sparsify": (
        *(sparsify, TRANSCODED, "topk", "EleutherAI/pythia-70m"),
        LayerConfig(index=2, **TRANSCODER),
    ),
    "dictionary_learning": (
        *(dictionary_learning, RELU, "relu", "EleutherAI/pythia-70m"),
        LayerConfig(index=3),
    ),
    "llamascopium": (llamascopium, THIRD, "jumprelu", "Qwen/Qwen3-1.7B", LayerConfig(index=7)),
    "circuit_tracer": (
        *(circuit_tracer, TRANSCODED, "jumprelu", "google/gemma-2-2b"),
        LayerConfig(index=1, **TRANSCODER),
    ),
    "gemma_scope": (gemma_scope, THIRD, "jumprelu", "google/gemma-2-2b", LayerConfig(index=20)),
    "gemma_scope_2": (
        *(gemma_scope_2, TRANSCODED, "jumprelu", "google/gemma-3-270m"),
        LayerConfig(index=5, **TRANSCODER),
    ),
    "llama_scope": (
        *(llama_scope, ([0, 0, 10], [2.5625, 2.375]), "jumprelu", LLAMA),
        LayerConfig(index=8),
    ),
    "qwen_scope": (qwen_scope, THIRD, "topk", "Qwen/Qwen3-8B-Base", LayerConfig(index=6)),
    "goodfire": (goodfire, RELU, "relu", f"{LLAMA}-Instruct", LayerConfig(index=19)),
}


def test_every_row_is_tested():
    assert list(BY_HAND) == list(FORMATS)


def assert_computes(sae, features: list, reconstruction: list) -> None:
    output = sae(X)
    assert_close(output.features[0], torch.tensor(features, dtype=torch.float32))
    assert_close(output.reconstruction[0], torch.tensor(reconstruction), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_by_hand(tmp_path, name):
    write_by_hand, (features, reconstruction), architecture, llm, layer = BY_HAND[name]
    file = write_by_hand(tmp_path)
    sae = load_sae(file)
    assert_computes(sae, features, reconstruction)
    assert sae.config.name == architecture
    metadata = {key: value for key, value in sae.metadata.items() if isinstance(value, str)}
    assert find_llm_name(metadata, "run") == llm
    assert read_layer(metadata, "run").resolve_sites(99) == layer.resolve_sites(99)


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_is_recognised_without_naming_the_weights(tmp_path, name):
    file = BY_HAND[name][0](tmp_path)
    folder = file.parent.parent if name == "llama_scope" else file.parent
    if name == "circuit_tracer":
        with pytest.raises(UserError, match=r"set holds 2 SAEs: give one of the files, such as .*"):
            load_sae(folder)
        (folder / "layer_10.safetensors").unlink()
    assert torch.equal(load_sae(folder).W_enc, load_sae(file).W_enc)
    files = [each for each in tmp_path.rglob("*") if each.is_file()]
    names = [each.relative_to(tmp_path).as_posix() for each in files]
    (found,) = find_saes(folder.relative_to(tmp_path).as_posix(), names)
    assert (found.entry, found.weights) == (FORMATS[name], file.relative_to(tmp_path).as_posix())
    assert {each for each in names if each.endswith((".json", ".yaml"))} == {*found.others}


def test_folders_of_dictionary_learning_say_the_site(tmp_path):
    """Its own setting first, then the folder's name, then the number of the block."""
    file = dictionary_learning(tmp_path / "mlp_out_layer_5")
    assert load_sae(file).metadata["hook_name"] == "mlp_out_layer_5"
    trainer = json.loads((file.parent / "config.json").read_text())["trainer"]
    change(file, "config.json", trainer=trainer | {"submodule_name": "attn_out_layer_1"})
    metadata = load_sae(file).metadata
    assert read_layer({"hook_name": metadata["hook_name"]}, "run").source is Kind.attn


@pytest.mark.parametrize(
    ("module", "transcode", "sites"),
    [
        ("layers.10", False, "resid.10"),
        ("h.3.attn", False, "attn.3"),
        ("layers.10.mlp", False, "mlp.10"),
        ("layers.10.mlp", True, "mlp_in.10 -> mlp.10"),
        ("layers.10.self_attn", True, "reads the input of layers.10.self_attn, which is not a kno"),
        ("my_sae", False, "does not say where its SAE reads: give the site with layer=..."),
    ],
)
def test_folders_of_sparsify_are_named_after_modules(tmp_path, module, transcode, sites):
    file = sparsify(tmp_path)
    change(file, "cfg.json", transcode=transcode)
    folder = file.parent.rename(tmp_path / module)
    hooks = {k: v for k, v in load_sae(folder).metadata.items() if k.startswith("hook_name")}
    if "." in sites and " " not in sites.replace(" -> ", ""):
        assert str(read_layer(hooks, "run").resolve_sites(99)) == sites
    else:
        with pytest.raises(UserError, match=sites):
            read_layer(hooks, "run")


@pytest.mark.parametrize("run", [{"transcode": True}, {}])
@torch.no_grad()
def test_the_first_transcoders_of_sparsify_read_x_minus_b_dec(tmp_path, run):
    """Their own settings do not say what they are: the file above does, or the skip connection.
    z = (x - b_dec) W_enc + b_enc = [3.25, -0.5, 4]."""
    file = sparsify(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(run))
    change(file, "cfg.json", transcode=None, skip_connection=True)
    sae = load_sae(file)
    assert str(read_layer(sae.metadata, "run").resolve_sites(99)) == "mlp_in.2 -> mlp.2"
    assert_computes(sae, [0, 0, 4], [6.25, 6.5])


@torch.no_grad()
def test_embeddings_of_gemma_scope_are_scaled(tmp_path):
    """z = x / sqrt(2) W_enc + b_enc = [2.6, -1.3, 3.54];  x_hat = sqrt(2) 3.54 [1, 1] + b_dec."""
    folder = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    folder.mkdir(parents=True)
    gemma_scope(tmp_path).rename(folder / "params.npz")
    arrays = dict(np.load(folder / "params.npz"))
    np.savez(folder / "params.npz", **arrays | {"threshold": np.full(3, 3.0)})
    sae = load_sae(folder)
    assert_computes(sae, [0, 0, 5 / math.sqrt(2)], [5.25, 4.5])
    block = shutil.copytree(folder, tmp_path / "embedding" / "layer_3" / "width_16k")
    assert torch.equal(load_sae(block).W_enc, W_ENC)
    with pytest.raises(UserError, match="reads hook_embed, .* it is the input of the first block"):
        read_layer(sae.metadata, "run")


@torch.no_grad()
def test_gemma_scope_is_read_with_names_in_lower_case_and_a_factor_of_1(tmp_path):
    file = gemma_scope(tmp_path)
    arrays = {name.lower(): array for name, array in np.load(file).items()}
    np.savez(file, **arrays, scaling_factor=np.ones(3))
    assert_computes(load_sae(file), *THIRD)


@pytest.mark.parametrize(
    ("kind", "hooks"),
    [
        ("mlp", {"hook_name": "blocks.20.hook_mlp_out"}),
        ("att", {"hook_name": "blocks.20.attn.hook_z"}),
        (
            "transcoders",
            {
                "hook_name": "blocks.20.ln2.hook_normalized",
                "hook_name_out": "blocks.20.hook_mlp_out",
            },
        ),
    ],
)
def test_the_repository_of_gemma_scope_says_the_site(tmp_path, kind, hooks):
    # as the hub's cache names it
    gemma_scope(tmp_path)
    root = tmp_path / f"models--google--gemma-scope-9b-it-{kind}" / "snapshots" / "abc"
    root.parent.mkdir(parents=True)
    (tmp_path / "gemma-scope-2b-pt-res").rename(root)
    metadata = load_sae(root / "layer_20" / "width_16k" / "average_l0_71").metadata
    assert metadata == {"model_name": "google/gemma-2-9b-it"} | hooks
    if kind == "att":
        with pytest.raises(UserError, match="attn.hook_z, which is not a site of this project"):
            read_layer(metadata, "run")


def test_gemma_scope_2_without_settings_is_known_by_its_folders(tmp_path):
    file = gemma_scope_2(tmp_path / "gemma-scope-2-1b-it")
    (file.parent / "config.json").unlink()
    assert load_sae(file).metadata == {
        "model_name": "google/gemma-3-1b-it",
        "hook_name": "blocks.5.mlp.hook_in",
        "hook_name_out": "blocks.5.hook_mlp_out",
    }


def change(file: Path, name: str, **settings) -> None:
    """Change settings in the file `name` beside or above the weights."""
    target = (file.parent / name).resolve()
    cfg = json.loads(target.read_text()) | settings
    target.write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))


@torch.no_grad()
def test_llamascopium_scales_activations_in_training(tmp_path):
    """As Llama Scope; z times the norm is [6.5, 0, 10 sqrt(2)]. The norms may be in the weights."""
    file = llamascopium(tmp_path)
    change(file, "config.json", norm_activation="dataset-wise", use_decoder_bias=False)
    norm = "dataset_average_activation_norm.blocks.7.hook_resid_post"
    tensors = load_file(file)
    del tensors["b_D"]
    save_file(tensors | {norm: torch.tensor(math.sqrt(2) / 2)}, file)
    expected = [6.5, 0, 10], [(6.5 + 10) / 2, 5]
    assert_computes(load_sae(file), *expected)
    del tensors[norm]
    save_file(tensors, file)
    with pytest.raises(UserError, match='no mean norm is saved: add "dataset_average_activation_n'):
        load_sae(file)
    change(file, "config.json", dataset_average_activation_norm={"in": math.sqrt(2) / 2})
    with pytest.raises(UserError, match="no mean norm is saved"):
        load_sae(file)
    norms = {"in": math.sqrt(2) / 2, "out": math.sqrt(2) / 2}
    change(file, "config.json", dataset_average_activation_norm=norms)
    assert_computes(load_sae(file), *expected)
    change(file, "config.json", dataset_average_activation_norm={"in": 0.0, "out": 1.0})
    with pytest.raises(UserError, match="dataset_average_activation_norm is 0.0 and should be pos"):
        load_sae(file)


@torch.no_grad()
def test_llama_scope_r1_has_the_names_of_llama_scope(tmp_path):
    tensors = LINEAR | {"decoder.bias": B_DEC, "log_jumprelu_threshold": torch.full((3,), 1.6)}
    file = llamascopium(tmp_path)
    write(file, tensors)
    change(file, "config.json", sae_type=None, hook_point_out=None)
    # z times the norm above exp(1.6) = 4.95
    assert_computes(load_sae(file), *THIRD)


@torch.no_grad()
def test_topk_of_llamascopium_counts_in_decoder_norms(tmp_path):
    """The largest of z times the norm, [3.5, 0, 7.07]; strengths count in norms, too."""
    file = llamascopium(tmp_path)
    tensors = {name: tensor for name, tensor in load_file(file).items() if "_" in name[:2]}
    save_file(tensors, file)
    change(file, "config.json", act_fn="topk", top_k=1)
    assert_computes(load_sae(file), [0, 0, 5 * math.sqrt(2)], [5.25, 4.5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae_type": "clt"}, r"config\.json: sae_type 'clt' is not supported \(sae\)"),
        ({"act_fn": "batchtopk"}, r"act_fn 'batchtopk' is not supported \(relu, topk, jumprelu\)"),
        ({"norm_activation": "token-wise"}, "norm_activation 'token-wise' is not supported"),
    ],
)
def test_what_llamascopium_knows_and_we_cannot_do_is_refused(tmp_path, changes, message):
    file = llamascopium(tmp_path)
    change(file, "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_sae(file)


def test_k_of_qwen_scope_is_asked_for(tmp_path):
    file = qwen_scope(tmp_path)
    file = file.rename(tmp_path / file.name)
    with pytest.raises(
        UserError, match=r"layer6\.sae\.pt does not say how many features are active"
    ):
        load_sae(file)


@pytest.mark.parametrize("name", ["params_layer_3.safetensors", "W_enc_3.safetensors"])
def test_a_cross_layer_transcoder_is_refused(tmp_path, name):
    file = write(tmp_path / name, {"w_enc": W_ENC})
    for path in (tmp_path, file):
        with pytest.raises(UserError, match="is a cross-layer transcoder, for which this project"):
            load_sae(path)


def test_a_path_with_brackets_is_a_path(tmp_path):
    file = goodfire(tmp_path)
    folder = tmp_path / "[abc] *"
    folder.mkdir()
    file.rename(folder / file.name)
    assert load_sae(folder).config.features == 3


def test_the_same_weights_file_belongs_to_the_format_whose_settings_are_there():
    scopium = ["sae_weights.safetensors", "config.json"]
    assert find_format(scopium) is FORMATS["llamascopium"]
    assert find_format([*scopium, "cfg.json"]) is FORMATS["saelens"]
    assert find_format(["checkpoints/final.safetensors"]) is FORMATS["llama_scope"]
    assert find_format(["deep/ae.pt", "model.safetensors", "config.json"]) is None


def read_stored(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of this test."""
    if file.suffix == ".npz":
        return {name: torch.from_numpy(array) for name, array in np.load(file).items()}
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file)


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


def damage(file: Path) -> Iterator[str]:
    """Damage a weights file in one way after another."""
    tensors, content = read_stored(file), file.read_bytes()
    encoder = next(each for each in tensors if re.search(r"enc.*[wW]ei|[wW]_[eE]", each))
    changed = {
        "lacks": {each: tensor for each, tensor in tensors.items() if each != encoder},
        "shape": tensors | {encoder: torch.ones(5, 4)},
        "nan": tensors | {encoder: tensors[encoder] * torch.nan},
        "ints": tensors | {encoder: tensors[encoder].int()},
        "other": {"weight": torch.ones(2)},
    }
    for harm, each in changed.items():
        write(file, each)
        yield harm
    for harm in (pickle.dumps(Bomb()), content[: len(content) // 2], b""):
        file.write_bytes(harm)
        yield str(harm[:20])


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_damaged_is_refused_in_one_line(tmp_path, capfd, name):
    file = BY_HAND[name][0](tmp_path)
    for harm in damage(file):
        with pytest.raises(UserError) as caught:
            load_sae(file)
        message = str(caught.value)
        assert str(tmp_path) in message, harm
        assert "\n" not in message
        assert not re.search("weights_only|allow_pickle|unsafe", message)
    assert "boom" not in capfd.readouterr().out


def test_objects_in_an_npz_are_not_unpickled(tmp_path, capfd):
    file = gemma_scope(tmp_path)
    np.savez(file, W_enc=np.array([Bomb()], dtype=object))
    with pytest.raises(UserError, match="it holds more than tensors and numbers") as caught:
        load_sae(file)
    assert "allow_pickle" not in str(caught.value)
    assert "boom" not in capfd.readouterr().out


def test_files_that_expand_without_limit_are_refused(tmp_path):
    file = gemma_scope(tmp_path)
    np.savez_compressed(file, **np.load(file), zeros=np.zeros(1_000_000))
    with pytest.raises(UserError, match=r"it would expand to 8,00\d,\d+ bytes"):
        load_sae(file)
    file = circuit_tracer(tmp_path)
    lines = ["a0: &a0 [x]", *(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]" for i in range(90))]
    (file.parent / "config.yaml").write_text("\n".join([*lines, "model_name: *a90"]))
    with pytest.raises(UserError, match="its settings hold an alias"):
        load_sae(file)


@pytest.mark.parametrize("name", FORMATS)
def test_settings_that_are_damaged_are_refused_in_one_line(tmp_path, name):
    file = BY_HAND[name][0](tmp_path)
    settings = FORMATS[name].settings_file
    if settings is None:
        assert name in ("gemma_scope", "qwen_scope", "goodfire")
        return
    folder = file.parent.parent if name == "llama_scope" else file.parent
    kinds = '{"k": {}, "act_fn": 3, "architecture": [], "model_kind": {}}'
    for content in ("[1, 2]", "{", kinds, "a: [", "\0", "[" * 100_000):
        (folder / settings).write_text(content)
        with pytest.raises(UserError) as caught:
            load_sae(file)
        assert "\n" not in str(caught.value)


def test_layouts_name_what_an_architecture_has():
    """Every tensor of an architecture is in each layout that is written, or is made by `write`."""
    made = {"threshold"}  # by dictionary_learning's, one for all features
    for row in FORMATS.values():
        for written in (row.autoencoders, row.transcoders):
            for ours, key in written.items():
                network = ARCHITECTURES[ours].network
                stored = {name.removesuffix(".T") for name in row.layouts[key].names.values()}
                assert {*network.per_feature, "b_dec"} - stored <= {"log_threshold"} | made
