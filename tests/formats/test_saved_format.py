"""The saved format: read back, in agreement with SAELens in both directions, never half written."""

import json
import math
import os
import stat
from itertools import product

import pytest
import torch
from forked import run_script
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.testing import assert_close

import sae_lightning
from sae_lightning.errors import UserError
from sae_lightning.files import write_json
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.formats.saelens import CFG, NOTE_KEY, WEIGHTS
from sae_lightning.formats.saved_format import describe_limits, save_sae
from sae_lightning.sae import ARCHITECTURES, SAE, Output, build_sae

D, FEATURES = 16, 40
SETTINGS = {"topk": {"k": 7}, "batch_topk": {"k": 7}, "matryoshka": {"k": 7, "groups": [0.1, 0.3]}}


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def trained(name: str = "relu", d_out: int = D, **settings) -> SAE:
    """An SAE with random weights as after training, for normalised activations."""
    kind = ARCHITECTURES[name].config
    sae = build_sae(
        kind(name=name, features=FEATURES, **SETTINGS.get(name, {}), **settings), D, d_out
    )
    with torch.no_grad():
        for seed, parameter in enumerate(sae.parameters()):
            parameter += 0.3 * noise(*parameter.shape, seed=seed)
        if name in ("batch_topk", "matryoshka"):
            sae.threshold += 0.8
    return sae


IN_SCALE, OUT_SCALE = torch.tensor(2.5), torch.tensor(0.5)


def raw_activations(n: int = 100) -> Tensor:
    return noise(n, D) * IN_SCALE + 3


def normalisation(d_out: int = D) -> tuple[Tensor, ...]:
    """in_mean, in_scale, out_mean, out_scale"""
    return 3 + noise(D, seed=3), IN_SCALE, noise(d_out, seed=4) - 1, OUT_SCALE


def save(folder, sae: SAE, **metadata):
    folder.parent.mkdir(exist_ok=True)
    save_sae(folder, sae, sae.fold(*normalisation(len(sae.b_dec))), metadata)
    return folder


def expect_output(sae: SAE) -> Output:
    """Expected reconstruction: normalise raw activations, run the SAE, undo the normalisation."""
    in_mean, in_scale, out_mean, out_scale = normalisation(len(sae.b_dec))
    output = sae((raw_activations() - in_mean) / in_scale)
    return output._replace(reconstruction=output.reconstruction * out_scale + out_mean)


def assert_agree(one: Output, other: Output) -> None:
    """Equal to 1e-5 of the largest value (float32 sums in another order), with the same zeros."""
    for ours, theirs in zip(one, other, strict=True):
        assert theirs.abs().max() > 1
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    assert 0.05 < (one.features > 1e-3).float().mean() < 0.9
    assert torch.equal(one.features > 1e-3, other.features > 1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("d_out", "skip"), [(D, False), (7, False), (7, True)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_read_back_does_for_raw_activations_what_was_trained(tmp_path, name, d_out, skip):
    sae = trained(name, d_out, skip=skip)
    site = {} if d_out == D else {"hook_name_out": "blocks.3.hook_mlp_out"}
    read = sae_lightning.load_sae(save(tmp_path / "sae", sae, hook_name="blocks.3.x", **site))
    assert_agree(read(raw_activations()), expect_output(sae))
    assert (type(read), read.config) == (type(sae), sae.config)
    assert read.metadata["hook_name"] == "blocks.3.x"


def one_feature(name: str, **parameters: list) -> SAE:
    """d_in = 2, one feature, d_out = 1; W_enc = [1, 2], b_enc = 0.5, W_dec = [3], b_dec = [-1]."""
    kind = ARCHITECTURES[name].config
    options = {"k": 1} if name in ("topk", "batch_topk") else {}
    sae = build_sae(kind(name=name, features=1, skip="W_skip" in parameters, **options), 2, 1)
    values = {"W_enc": [[1.0], [2.0]], "b_enc": [0.5], "W_dec": [[3.0]], "b_dec": [-1.0]}
    sae.load_weights({name: torch.tensor(value) for name, value in (values | parameters).items()})
    return sae


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "parameters", "folded", "feature", "reconstruction"),
    [
        # z = ([3, 5] - 1) / 2 = [1, 2], so W_enc / 2 = [0.5, 1] and b_enc = 0.5 - [1, 1] @ [0.5, 1]
        ("relu", {}, {"W_enc": [[0.5], [1.0]], "b_enc": [-1.0]}, 5.5, 72),
        # W_dec x 4 and b_dec x 4 + 10: 5.5 x 12 + 6 = 72
        ("relu", {}, {"W_dec": [[12.0]], "b_dec": [6.0]}, 5.5, 72),
        # a threshold is in units of the feature, which stays what it was
        ("jumprelu", {"threshold": [5.4]}, {"threshold": [5.4]}, 5.5, 72),
        ("jumprelu", {"threshold": [5.6]}, {"threshold": [5.6]}, 0, 6),
        ("batch_topk", {"threshold": [5.6]}, {"threshold": [5.6]}, 0, 6),
        # 2 (z W_enc) + 0.25 = 10.25; the shift of 1.5 goes through exp(r_mag) = 2
        (
            "gated",
            {"r_mag": [math.log(2)], "b_mag": [0.25]},
            {"b_enc": [-1.0], "r_mag": [math.log(2)], "b_mag": [-2.75]},
            10.25,
            129,
        ),
        # z W_skip = 1 adds 4: W_skip x 4 / 2 = [2, 0], of which b_dec takes back 2
        (
            "relu",
            {"W_skip": [[1.0], [0.0]]},
            {"W_skip": [[2.0], [0.0]], "b_dec": [4.0]},
            5.5,
            76,
        ),
    ],
)
def test_folding_by_hand(name, parameters, folded, feature, reconstruction):
    """x = [3, 5], in_mean 1, in_scale 2, out_mean 10, out_scale 4."""
    sae = one_feature(name, **parameters)
    one = torch.ones(2)
    weights = sae.fold(one, torch.tensor(2.0), torch.tensor([10.0]), torch.tensor(4.0))
    for key, value in folded.items():
        assert_close(weights[key], torch.tensor(value), msg=lambda text, key=key: f"{key}: {text}")
    sae.load_weights(weights)
    output = sae(torch.tensor([[3.0, 5.0]]))
    assert_close(output.features, torch.tensor([[feature]], dtype=torch.float32))
    assert_close(output.reconstruction, torch.tensor([[reconstruction]], dtype=torch.float32))


def test_a_run_folder_and_its_sae_folder_are_both_understood(tmp_path):
    save(tmp_path / "run" / "sae", trained(), model_name="gpt2", hook_name="blocks.3.x")
    from_run, from_folder = load_sae(tmp_path / "run"), load_sae(str(tmp_path / "run" / "sae"))
    assert torch.equal(from_run.W_enc, from_folder.W_enc)
    assert from_run.metadata["hook_name"] == "blocks.3.x"
    assert not any(parameter.requires_grad for parameter in from_run.parameters())
    assert not from_run.training


def test_the_folder_says_what_the_weights_say(tmp_path):
    save(tmp_path, trained(), model_name="gpt2")
    cfg = json.loads((tmp_path / CFG).read_text())
    shapes = {name: tuple(weight.shape) for name, weight in load_file(tmp_path / WEIGHTS).items()}
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == ("standard", D, FEATURES)
    assert cfg["apply_b_dec_to_input"] is False
    assert cfg["metadata"]["model_name"] == "gpt2"
    assert shapes == {"W_enc": (D, 40), "b_enc": (40,), "W_dec": (40, D), "b_dec": (D,)}
    assert sorted(os.listdir(tmp_path)) == [CFG, WEIGHTS]


def rewrite_cfg(folder, **changes):
    """Change entries of cfg.json; None removes one."""
    cfg = json.loads((folder / CFG).read_text()) | changes
    write_json(folder / CFG, {key: value for key, value in cfg.items() if value is not None})


@torch.no_grad()
@pytest.mark.parametrize("subtracts", [True, None])
def test_an_encoder_that_reads_x_minus_b_dec_is_honoured(tmp_path, subtracts):
    """f = relu((x - b_dec) W_enc + b_enc), which is also the default of SAELens."""
    sae = load_sae(save(tmp_path, trained()))
    rewrite_cfg(tmp_path, apply_b_dec_to_input=subtracts)
    x = raw_activations()
    shifted = load_sae(tmp_path)(x)
    assert_close(shifted.features, sae.encode(x - sae.b_dec), rtol=1e-5, atol=1e-4)
    assert_close(shifted.reconstruction, sae.decode(shifted.features))


def test_weights_saved_in_half_precision_are_read_as_float32(tmp_path):
    save(tmp_path, trained())
    halves = {name: w.bfloat16() for name, w in load_file(tmp_path / WEIGHTS).items()}
    save_file(halves, tmp_path / WEIGHTS)
    rewrite_cfg(tmp_path, apply_b_dec_to_input=True)
    sae = load_sae(tmp_path)
    assert {parameter.dtype for parameter in sae.parameters()} == {torch.float32}
    # nothing but the stored numbers is rounded
    b_enc = halves["b_enc"].float() - halves["b_dec"].float() @ halves["W_enc"].float()
    assert_close(sae.b_enc.data, b_enc, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_folder_without_our_description_is_read_as_saelens_does(tmp_path, name):
    """From SAELens' architecture alone, a dense SAE is a ReLU and a BatchTopK SAE a JumpReLU."""
    sae = trained(name)
    rewrite_cfg(save(tmp_path, sae), sae_lightning=None)
    read = load_sae(tmp_path)
    assert type(read).architecture == sae.architecture
    assert_agree(read(raw_activations()), expect_output(sae))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def rewrite_weights(folder, **changes):
    """Change tensors; None removes one."""
    weights = load_file(folder / WEIGHTS) | changes
    save_file({name: w for name, w in weights.items() if w is not None}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "holds no saved SAE: give a run folder"),
        (lambda f: (f / CFG).unlink(), "holds no saved SAE: cfg.json is missing"),
        (lambda f: cut(f / WEIGHTS), "is damaged or not an SAE"),
        (lambda f: cut(f / CFG), "is damaged or not an SAE"),
        (lambda f: (f / CFG).write_text("[]"), "is damaged or not an SAE"),
        (lambda f: save_file({"w": torch.ones(2)}, f / WEIGHTS), "not an SAE: it holds w"),
        (lambda f: rewrite_weights(f, W_enc=torch.ones(3)), "it holds W_dec, W_enc, b_dec, b_enc"),
        (lambda f: rewrite_weights(f, b_enc=None), "not an SAE: b_enc is missing"),
        (lambda f: rewrite_weights(f, r_mag=torch.ones(40)), "r_mag does not belong to a relu SAE"),
        (lambda f: rewrite_weights(f, b_enc=torch.ones(41)), r"b_enc is \[41\] and should be \[40"),
        (
            lambda f: rewrite_cfg(f, sae_lightning={"name": "relu", "features": 40, "tilt": 2}),
            "sae_lightning.tilt=2 was written by another version: update, or remove the key",
        ),
        (
            lambda f: rewrite_cfg(f, sae_lightning={"name": "oracle", "depth": 2}),
            "there is no architecture oracle here; add the plugin that brings it",
        ),
        (lambda f: rewrite_cfg(f, sae_lightning=["relu"]), "is damaged or not an SAE"),
        (
            lambda f: rewrite_cfg(f, sae_lightning={"name": "topk", "k": 41}),
            "model.k=41: give a number from 1 to",
        ),
        (
            lambda f: rewrite_cfg(f, sae_lightning={"name": "topk", "k": "7"}),
            "is damaged or not an",
        ),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(tmp_path, harm, message):
    harm(save(tmp_path, trained()))
    with pytest.raises(UserError, match=message) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_transcoder_cannot_subtract_a_b_dec_of_another_width(tmp_path):
    rewrite_cfg(save(tmp_path, trained(d_out=7)), apply_b_dec_to_input=True)
    with pytest.raises(
        UserError, match="b_dec has width 7 and cannot be subtracted from inputs of width 16"
    ):
        load_sae(tmp_path)


def test_a_path_that_is_a_file_or_nothing_says_what_to_give(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file holds no saved SAE: give a run folder"):
        load_sae(tmp_path / "file")
    with pytest.raises(UserError, match="nothing: no such folder or file"):
        load_sae(tmp_path / "nothing")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_as_readable_as_the_user_has_asked_for(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        save(tmp_path, trained())
        assert os.umask(mask) == mask, "asking for the mask does not change it"
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (CFG, WEIGHTS)}
    assert modes == {mode}


TRANSCODERS = {
    "transcoder": trained("relu", 7),
    "skip_transcoder": trained("relu", 7, skip=True),
    "jumprelu_transcoder": trained("batch_topk", 7),
    "jumprelu_skip_transcoder": trained("jumprelu", 7, skip=True),
    "topk": trained("topk"),
    "gated": trained("gated"),
}
# Opens our folders, writes its own, and returns its reconstructions of raw activations.
SAELENS = """
import sys, torch
from pathlib import Path
from sae_lens import *
from sae_lens.saes.transcoder import *
from sae_lens.training.activation_scaler import ActivationScaler

root, theirs = Path(sys.argv[1]), Path(sys.argv[2])
x, results = torch.load(root / "x.pt"), {}

def note(name, sae):
    results[name] = (sae.cfg.architecture(), sae(x), sae.encode(x))

def shake(sae):
    torch.manual_seed(0)
    for parameter in sae.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    return sae

def write(name, kind, **cfg):
    sae = shake(kind[0](kind[1](d_in=16, d_sae=40, dtype="float32", device="cpu", **cfg)))
    note(name, sae)
    sae.save_model(theirs / name)

def train(name, kind, **cfg):
    cfg = dict(d_in=16, d_sae=40, dtype="float32", device="cpu", decoder_init_norm=1.0) | cfg
    sae = shake(kind[0](kind[1](**cfg)))
    if "topk_threshold" in dict(sae.named_buffers()):
        sae.topk_threshold += 0.7
    sae.save_model(theirs / (name + "_checkpoint"))
    if "normalize_activations" in cfg:
        scaler = ActivationScaler(scaling_factor=0.4)
        scaler.save(str(theirs / (name + "_checkpoint") / "activation_scaler.json"))
        sae.fold_activation_norm_scaling_factor(0.4)
    sae.save_inference_model(theirs / name)
    note(name, SAE.load_from_disk(theirs / name))

with torch.no_grad():
    for folder in sorted((root / "ours").iterdir()):
        note(folder.name, SAE.load_from_disk(folder))
    standard, topk = (StandardSAE, StandardSAEConfig), (TopKSAE, TopKSAEConfig)
    write("standard", standard)
    write("standard_uncentred", standard, apply_b_dec_to_input=False)
    write("topk", topk, k=7)
    write("topk_rescaled", topk, k=7, rescale_acts_by_decoder_norm=True)
    write("jumprelu", (JumpReLUSAE, JumpReLUSAEConfig))
    write("gated", (GatedSAE, GatedSAEConfig))
    for kind in (
        (Transcoder, TranscoderConfig),
        (SkipTranscoder, SkipTranscoderConfig),
        (JumpReLUTranscoder, JumpReLUTranscoderConfig),
        (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig),
    ):
        write(kind[1].architecture(), kind, d_out=7, apply_b_dec_to_input=False)
    batch, nested = (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig), (
        MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig)
    train("trained_topk", (TopKTrainingSAE, TopKTrainingSAEConfig), k=7)
    train("trained_jumprelu", (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig))
    train("trained_batch", batch, k=7.5)
    train("trained_batch_scaled", batch, k=7, normalize_activations="expected_average_only_in")
    train("trained_batch_plain", batch, k=7, normalize_activations="expected_average_only_in",
          rescale_acts_by_decoder_norm=False)
    train("trained_nested", nested, k=7, matryoshka_widths=[4, 16, 40])
torch.save(results, root / "results.pt")
"""
WRITTEN = {  # by SAELens -> the class that reads it
    **{"standard": "ReLU", "standard_uncentred": "ReLU", "topk": "TopK", "topk_rescaled": "TopK"},
    **{"jumprelu": "JumpReLU", "gated": "Gated", "transcoder": "ReLU", "skip_transcoder": "ReLU"},
    **{"jumprelu_transcoder": "JumpReLU", "jumprelu_skip_transcoder": "JumpReLU"},
    **{"trained_topk": "TopK", "trained_jumprelu": "JumpReLU", "trained_batch": "JumpReLU"},
    **{"trained_batch_scaled": "JumpReLU", "trained_batch_plain": "JumpReLU"},
    **{"trained_nested": "JumpReLU"},
    **{"trained_topk_checkpoint": "TopK", "trained_jumprelu_checkpoint": "JumpReLU"},
    **{"trained_batch_checkpoint": "BatchTopK", "trained_batch_scaled_checkpoint": "BatchTopK"},
    **{"trained_batch_plain_checkpoint": "BatchTopK", "trained_nested_checkpoint": "Matryoshka"},
}


@pytest.fixture(scope="module")
def saelens(tmp_path_factory):
    """All results of SAELens from one process, because importing it takes most of the time."""
    root = tmp_path_factory.mktemp("saelens")
    torch.save(raw_activations(), root / "x.pt")
    for name in ARCHITECTURES:
        save(root / "ours" / f"our_{name}", trained(name), hook_name="blocks.3.hook_resid_post")
    for name, sae in TRANSCODERS.items():
        names = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
        save(root / "ours" / f"our_{name}_transcoder", sae, **names)
    (root / "run.py").write_text(SAELENS)
    done = run_script(str(root / "run.py"), str(root), str(root / "theirs"), cwd=root)
    assert done.returncode == 0, done.stderr
    results = torch.load(root / "results.pt")
    return root, {name: (kind, Output(*result)) for name, (kind, *result) in results.items()}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saelens_opens_every_architecture_and_agrees(saelens, name):
    _, results = saelens
    kind, theirs = results[f"our_{name}"]
    assert kind == ARCHITECTURES[name].network.architecture
    assert_agree(theirs, expect_output(trained(name)))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", TRANSCODERS)
def test_saelens_opens_transcoders_and_agrees(saelens, name):
    _, results = saelens
    kind, theirs = results[f"our_{name}_transcoder"]
    assert kind == name
    assert_agree(theirs, expect_output(TRANSCODERS[name]))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", WRITTEN)
def test_a_folder_that_saelens_wrote_is_read_and_agrees(saelens, name):
    root, results = saelens
    sae = load_sae(root / "theirs" / name)
    assert type(sae).__name__ == WRITTEN[name]
    _, theirs = results[name.removesuffix("_checkpoint")]
    assert_agree(sae(raw_activations()), theirs)
    if name == "trained_nested_checkpoint":
        assert sae.config.sizes() == [4, 12, 24]


@pytest.mark.parametrize(("name", "skip"), [*product(ARCHITECTURES, [False, True])])
def test_the_file_says_where_saelens_has_no_such_transcoder(tmp_path, name, skip):
    sae = trained(name, 7, skip=skip)
    save(tmp_path, sae, hook_name="blocks.3.mlp.hook_in", hook_name_out="blocks.3.hook_mlp_out")
    note = load_sae(tmp_path).metadata.get(NOTE_KEY, "")
    assert ("SAELens has no" in note) == (sae.architecture in ("topk", "gated"))
    assert ("as an autoencoder" in note) == (bool(note) and not skip)
    assert note == (describe_limits(sae) or "")


def test_an_autoencoder_needs_no_such_word(tmp_path):
    assert NOTE_KEY not in load_sae(save(tmp_path / "sae", trained("topk"))).metadata
