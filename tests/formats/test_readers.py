"""Folders in other tools' formats, checked against the documented equations of these tools."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.testing import assert_close

from sae_lightning import UserError, load_sae
from sae_lightning.formats.saelens import CFG, WEIGHTS
from sae_lightning.formats.trained_on import read_layer

D, FEATURES, K = 12, 30, 5


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


X = 2 * noise(200, D, seed=9) + 1
W_ENC, B_ENC = noise(D, FEATURES, seed=1), noise(FEATURES, seed=2)
W_DEC, B_DEC = noise(FEATURES, D, seed=3), noise(D, seed=4)
R_MAG, B_MAG, W_SKIP = 0.3 * noise(FEATURES, seed=5), noise(FEATURES, seed=6), noise(D, D, seed=7)
THRESHOLD = torch.tensor(2.0)


def topk(z: Tensor, k: int = K) -> Tensor:
    """The k largest of relu(z) in each row, the others 0."""
    z = z.relu()
    return z * (z >= z.topk(k).values[:, -1:])


def assert_computes(sae, features: Tensor, reconstruction: Tensor) -> None:
    output = sae(X)
    assert 0 < (features > 0).float().mean() < 0.9
    assert torch.equal(output.features > 0, features > 0)
    assert_close(output.features, features, rtol=1e-5, atol=1e-4)
    assert_close(output.reconstruction, reconstruction, rtol=1e-5, atol=1e-3)


def sparsify(folder: Path, **changes) -> Path:
    """What `SparseCoder.save_to_disk` writes; None removes an entry."""
    cfg = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "k": K}
    cfg |= {"num_latents": FEATURES, "multi_topk": False, "d_in": D, "transcode": False}
    tensors = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    if changes.get("skip_connection"):
        tensors["W_skip"] = W_SKIP.T  # [d_out, d_in]
    cfg = {key: value for key, value in (cfg | changes).items() if value is not None}
    (folder / CFG).write_text(json.dumps(cfg))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcode", [False, True, None])
def test_sparsify(tmp_path, transcode, skip):
    """topk((x - b_dec) W_enc + b_enc) for an SAE, topk(x W_enc + b_enc) for a transcoder; a skip
    connection sees x in both cases."""
    sae = load_sae(sparsify(tmp_path, transcode=transcode, skip_connection=skip))
    features = topk((X if transcode else X - B_DEC) @ W_ENC + B_ENC)
    assert_computes(sae, features, features @ W_DEC + B_DEC + (X @ W_SKIP if skip else 0))
    assert (type(sae).__name__, sae.config.k, sae.config.skip) == ("TopK", K, skip)
    assert sae.metadata["expansion_factor"] == 32


@pytest.mark.parametrize("changes", [{"activation": "groupmax"}, {"signed": True}])
def test_sparsify_with_another_activation_is_refused(tmp_path, changes):
    with pytest.raises(UserError, match=r"activation '(groupmax|signed topk)' is not supported"):
        load_sae(sparsify(tmp_path, **changes))


LINEAR = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
MATRICES = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
BUFFERS = {"k": torch.tensor(K, dtype=torch.int), "threshold": THRESHOLD}
GATED = {"decoder_bias": B_DEC, "r_mag": R_MAG, "gate_bias": B_ENC, "mag_bias": B_MAG}
CENTRED = (X - B_DEC) @ W_ENC
Z = CENTRED + B_ENC
SIZES = torch.tensor([3, 9, 18])
DICTIONARIES = {  # class -> its tensors, its features of X, our class
    "AutoEncoder": (LINEAR | {"bias": B_DEC}, Z.relu(), "ReLU"),
    "AutoEncoderNew": (LINEAR | {"decoder.bias": B_DEC}, (X @ W_ENC + B_ENC).relu(), "ReLU"),
    "AutoEncoderTopK": (LINEAR | BUFFERS | {"b_dec": B_DEC}, topk(Z), "TopK"),
    "BatchTopKSAE": (LINEAR | BUFFERS | {"b_dec": B_DEC}, Z * (Z > THRESHOLD), "BatchTopK"),
    "MatryoshkaBatchTopKSAE": (
        MATRICES | BUFFERS | {"group_sizes": SIZES},
        Z * (Z > THRESHOLD),
        "Matryoshka",
    ),
    "JumpReluAutoEncoder": (
        MATRICES | {"threshold": THRESHOLD + R_MAG},
        (X @ W_ENC + B_ENC) * (X @ W_ENC + B_ENC > THRESHOLD + R_MAG),
        "JumpReLU",
    ),
    "GatedAutoEncoder": (
        {name: LINEAR[name] for name in ("encoder.weight", "decoder.weight")} | GATED,
        (Z > 0) * (CENTRED * R_MAG.exp() + B_MAG).relu(),
        "Gated",
    ),
}


def dictionary(folder: Path, name: str, **changes) -> Path:
    """Write a folder as `trainSAE` of dictionary_learning does."""
    trainer = {"dict_class": name, "lm_name": "pythia", "layer": 3, "k": 80}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    tensors = DICTIONARIES[name][0] if name in DICTIONARIES else MATRICES
    torch.save(tensors | changes, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_learning(tmp_path, name):
    _, features, ours = DICTIONARIES[name]
    sae = load_sae(dictionary(tmp_path, name))
    assert_computes(sae, features, features @ W_DEC + B_DEC)
    assert type(sae).__name__ == ours
    assert sae.metadata["lm_name"] == "pythia"
    # config.json has the k with which an annealed run began
    assert getattr(sae.config, "k", K) == K
    if ours == "Matryoshka":
        assert sae.config.sizes() == SIZES.tolist()


def test_a_state_dict_that_was_saved_as_it_is_is_read(tmp_path):
    """Of a module's tensors, torch makes an OrderedDict, with what it calls metadata."""
    sae = torch.nn.Module()
    for name, tensor in DICTIONARIES["JumpReluAutoEncoder"][0].items():
        sae.register_parameter(name, torch.nn.Parameter(tensor))
    folder = dictionary(tmp_path, "JumpReluAutoEncoder")
    torch.save(sae.state_dict(), folder / "ae.pt")
    features = DICTIONARIES["JumpReluAutoEncoder"][1]
    assert_computes(load_sae(folder), features, features @ W_DEC + B_DEC)


def test_a_threshold_that_was_never_set_lets_all_positive_features_pass(tmp_path):
    sae = load_sae(dictionary(tmp_path, "BatchTopKSAE", threshold=torch.tensor(-1.0)))
    assert_computes(sae, Z.relu(), Z.relu() @ W_DEC + B_DEC)


def test_a_k_that_is_only_in_the_settings_is_taken_from_there(tmp_path):
    folder = dictionary(tmp_path, "AutoEncoderTopK")
    torch.save(LINEAR | {"b_dec": B_DEC}, folder / "ae.pt")
    (folder / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoderTopK", "k": 3}}')
    assert_computes(load_sae(folder), topk(Z, 3), topk(Z, 3) @ W_DEC + B_DEC)


def test_one_group_is_a_batch_topk(tmp_path):
    folder = dictionary(tmp_path, "MatryoshkaBatchTopKSAE", group_sizes=torch.tensor([FEATURES]))
    assert type(load_sae(folder)).__name__ == "BatchTopK"


def test_an_unknown_dictionary_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"dict_class 'CrossCoder' is not supported \(AutoEncoder, "
    ):
        load_sae(dictionary(tmp_path, "CrossCoder"))


class Bomb:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("write", [sparsify, lambda folder: dictionary(folder, "GatedAutoEncoder")])
@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda x: x.index_fill(0, torch.tensor([2]), torch.nan), "1 of 30 numbers are not finite"),
        (lambda x: x / 0, "30 of 30 numbers are not finite"),
        (lambda x: x > 0, "30 numbers are of type bool, not floating-point"),
        (lambda x: x.int(), "30 numbers are of type int32, not floating-point"),
        (lambda x: x * 1j, "30 numbers are of type complex64, not floating-point"),
        (lambda x: x.double() * 1e300, "30 of 30 numbers are not finite"),
    ],
)
def test_numbers_that_are_not_real_and_finite_are_counted_and_refused(tmp_path, write, harm, told):
    folder = write(tmp_path)
    file = next(file for file in folder.iterdir() if file.suffix in (".safetensors", ".pt"))
    safe = file.suffix == ".safetensors"
    tensors = load_file(file) if safe else torch.load(file)
    name = "encoder.bias" if safe else "gate_bias"
    tensors[name] = harm(tensors[name] + 0.1)
    (save_file if safe else torch.save)(tensors, file)
    with pytest.raises(UserError, match=f"is damaged or not an SAE: {name}: {told}"):
        load_sae(folder)


def test_a_tensor_that_is_told_to_be_larger_than_its_file_takes_no_memory(tmp_path):
    folder = dictionary(tmp_path, "AutoEncoder")
    torch.save(LINEAR | {"bias": torch.ones(1).expand(1 << 50)}, folder / "ae.pt")
    with pytest.raises(UserError, match="bias is larger than its storage"):
        load_sae(folder)


def test_a_flipped_bit_in_a_pickle_of_weights_is_noticed(tmp_path):
    file = dictionary(tmp_path, "AutoEncoder") / "ae.pt"
    weights, content = W_ENC.numpy().tobytes(), bytearray(file.read_bytes())
    content[content.index(weights) + 40] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="the checksum of 'ae/data/0' is wrong"):
        load_sae(tmp_path)


@pytest.mark.parametrize("k", [2.5, True, "3", None, [3], 10**30, -1])
def test_settings_of_an_odd_type_are_refused_in_one_line(tmp_path, k):
    with pytest.raises(UserError, match="is damaged or not an SAE: ") as caught:
        folder = sparsify(tmp_path)
        cfg = json.loads((folder / CFG).read_text()) | {"k": k}
        (folder / CFG).write_text(json.dumps(cfg))
        load_sae(folder)
    assert "\n" not in str(caught.value)


def test_a_file_without_end_is_refused_and_not_waited_for(tmp_path):
    (sparsify(tmp_path) / CFG).unlink()
    os.mkfifo(tmp_path / CFG)
    with pytest.raises(UserError, match=r"cfg\.json cannot be read: it is not a regular file$"):
        load_sae(tmp_path)


@pytest.mark.parametrize("whole", [torch.nn.Linear(2, 2), Bomb(Path("trace"))])
def test_the_refusal_of_a_pickle_does_not_say_how_to_load_it_all_the_same(tmp_path, whole):
    folder = dictionary(tmp_path, "AutoEncoder")
    torch.save(whole, folder / "ae.pt")
    with pytest.raises(
        UserError, match=r"not an SAE: it holds more than tensors and numbers, "
    ) as no:
        load_sae(folder)
    assert "weights_only" not in str(no.value)


def test_no_code_in_a_pickle_runs(tmp_path):
    folder, trace = dictionary(tmp_path, "AutoEncoder"), tmp_path / "trace"
    with open(folder / "ae.pt", "wb") as file:
        pickle.dump(Bomb(trace), file, protocol=2)
    with pytest.raises(UserError, match="is damaged or not an SAE"):
        load_sae(folder)
    assert not trace.exists()
    pickle.loads((folder / "ae.pt").read_bytes())
    assert trace.exists(), "the pickle was harmless"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no saved SAE: config.json is missing"),
        (lambda f: (f / "config.json").write_text("{}"), "it lacks 'trainer'"),
        (lambda f: (f / "ae.pt").write_bytes(b""), "is damaged or not an SAE"),
        (lambda f: torch.save(torch.ones(3), f / "ae.pt"), "is damaged or not an SAE"),
        (lambda f: torch.save(LINEAR, f / "ae.pt"), "b_dec is missing"),
        (
            lambda f: dictionary(f, "AutoEncoder", r_mag=R_MAG),
            "r_mag does not belong to a relu SAE",
        ),
    ],
)
def test_a_damaged_dictionary_says_why(tmp_path, harm, message):
    harm(dictionary(tmp_path, "AutoEncoder"))
    with pytest.raises(UserError, match=message) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def saelens(folder: Path, tensors: dict[str, Tensor] = MATRICES, **cfg) -> Path:
    """Write a folder of SAELens: of version 6 with `metadata`, of versions 3 to 5 without."""
    (folder / CFG).write_text(
        json.dumps({"d_in": D, "d_sae": len(B_ENC), "dtype": "float32"} | cfg)
    )
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
    return folder


def test_saelens_of_before_version_6(tmp_path):
    """No architecture, TopK as an activation function, a factor of ones, the model at the top."""
    k = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    tensors = MATRICES | {"scaling_factor": torch.ones(FEATURES)}
    sae = load_sae(saelens(tmp_path, tensors, hook_name="blocks.3.hook_z", **k))
    assert_computes(sae, topk(Z), topk(Z) @ W_DEC + B_DEC)
    assert (sae.config.k, sae.metadata["hook_name"]) == (K, "blocks.3.hook_z")


@pytest.mark.parametrize(
    ("cfg", "centre"),
    [
        ({"model_name": "gpt2-small", "hook_point": "blocks.3.hook_resid_pre"}, True),
        ({"model_name": "gemma-2b", "hook_point": "blocks.3.hook_resid_pre"}, False),
        ({"model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_pre"}, False),
        (
            {
                "model_name": "gpt2-small",
                "hook_name": "blocks.3.hook_resid_pre",
                "model_from_pretrained_kwargs": {"center_writing_weights": True},
                "apply_b_dec_to_input": False,
            },
            True,
        ),
    ],
)
def test_saes_of_centred_residual_streams_take_raw_ones(tmp_path, cfg, centre):
    """The oldest files of SAELens, gpt2-small-res-jb among them, call the site hook_point, and were
    trained on TransformerLens' processed LLM: x less its mean over dimensions, unless the LLM has
    no LayerNorm."""
    sae = load_sae(saelens(tmp_path, **cfg))
    x = X - X.mean(dim=1, keepdim=True) if centre else X
    features = ((x - B_DEC * cfg.get("apply_b_dec_to_input", True)) @ W_ENC + B_ENC).relu()
    assert_computes(sae, features, features @ W_DEC + B_DEC)
    assert read_layer(sae.metadata, "run").index == 2


def test_saelens_topk_without_k_has_100(tmp_path):
    wide = {"W_enc": noise(D, 120), "b_enc": noise(120), "W_dec": noise(120, D), "b_dec": B_DEC}
    sae = load_sae(saelens(tmp_path, wide, architecture="topk", metadata={}))
    assert sae.config.k == 100


def test_saelens_counts_in_decoder_norms_where_it_says_so(tmp_path):
    cfg = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True, "metadata": {}}
    features = topk(Z * W_DEC.norm(dim=1))
    rows = W_DEC / W_DEC.norm(dim=1, keepdim=True)
    assert_computes(load_sae(saelens(tmp_path, **cfg)), features, features @ rows + B_DEC)


def test_a_scale_that_saelens_keeps_beside_a_checkpoint_is_folded_in(tmp_path):
    cfg = {"normalize_activations": "expected_average_only_in", "metadata": {}}
    folder = saelens(tmp_path, architecture="standard", **cfg)
    with pytest.raises(UserError, match="the factor is not saved: fold it in with SAELens"):
        load_sae(folder)
    scaler = folder / "activation_scaler.json"
    scaler.write_text(json.dumps({"scaling_factor": None, "has_whitening": True}))
    with pytest.raises(UserError, match="the factor is not saved"):
        load_sae(folder)
    scaler.write_text(json.dumps({"scaling_factor": 0.25}))
    features = ((0.25 * X - B_DEC) @ W_ENC + B_ENC).relu()
    assert_computes(load_sae(folder), features, (features @ W_DEC + B_DEC) / 0.25)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            {"architecture": "temporal"},
            r"architecture 'temporal' is not supported \(standard, topk",
        ),
        ({"activation_fn": "tanh-relu"}, r"activation_fn 'tanh-relu' is not supported \(relu\)"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations=layer_norm cannot be"),
        ({"normalize_activations": "covariance_whitening"}, "=covariance_whitening cannot be"),
        ({"normalize_activations": True}, "=True, but the factor is not saved"),
    ],
)
def test_what_saelens_knows_and_we_cannot_do_is_refused(tmp_path, cfg, message):
    with pytest.raises(UserError, match=message) as caught:
        load_sae(saelens(tmp_path, **cfg))
    assert str(tmp_path / CFG) in str(caught.value)


def test_a_scaling_factor_other_than_1_is_refused(tmp_path):
    tensors = MATRICES | {"scaling_factor": torch.full((FEATURES,), 2.0)}
    with pytest.raises(UserError, match="scaling_factor does not belong to a relu SAE"):
        load_sae(saelens(tmp_path, tensors))


def test_what_is_null_was_not_given(tmp_path):
    """A null counts as absent, also in the metadata."""
    folder = saelens(tmp_path, model_name="a/b")
    plain, cfg = load_sae(folder), json.loads((folder / CFG).read_text())
    nothing = ["activation_fn", "normalize_activations", "rescale_acts_by_decoder_norm"]
    (folder / CFG).write_text(json.dumps(dict.fromkeys(nothing) | cfg | {"metadata": None}))
    read = load_sae(folder)
    assert torch.equal(read.W_enc, plain.W_enc)
    assert read.metadata["model_name"] == "a/b"


def test_dictionary_learning_says_what_it_reads(tmp_path):
    folder = dictionary(tmp_path, "AutoEncoder")
    cfg = json.loads((folder / "config.json").read_text())
    cfg["trainer"]["submodule_name"], cfg["buffer"]["ctx_len"] = "resid_post_layer_3", 16
    (folder / "config.json").write_text(json.dumps(cfg))
    metadata = load_sae(folder).metadata
    assert (metadata["model_name"], metadata["context_size"]) == ("pythia", 16)
    assert metadata["hook_name"] == "resid_post_layer_3"
