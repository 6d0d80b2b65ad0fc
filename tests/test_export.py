"""The saved format: read back, agreed on with SAELens, and never half written."""

import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Generator
from torch.testing import assert_close

import sae_lightning
from sae_lightning.errors import UserError
from sae_lightning.export import CFG, WEIGHTS, load_sae, save_sae
from sae_lightning.files import write_json
from sae_lightning.sae import SAE, SAEConfig, build

D, FEATURES, OFFSET, SCALE = 16, 40, 3.0, 2.5


def trained(d_out: int = D) -> SAE:
    """An SAE with weights that training could have left, for normalised activations."""
    generator = Generator().manual_seed(1)
    sae = build(SAEConfig(features=FEATURES), D, d_out)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return sae


def raw_activations(n: int = 100) -> torch.Tensor:
    return torch.randn(n, D, generator=Generator().manual_seed(2)) * SCALE + OFFSET


def normalisation(d_out: int = D):
    """in_mean, in_scale, out_mean, out_scale"""
    return torch.full((D,), OFFSET), torch.tensor(SCALE), torch.full((d_out,), -1.0), torch.ones(())


def save(folder, sae: SAE, **metadata):
    d_out = sae.b_dec.shape[0]
    save_sae(folder, sae.architecture, sae.fold(*normalisation(d_out)), metadata)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("d_out", [D, 7])
def test_what_is_read_back_does_for_raw_activations_what_was_trained(tmp_path, d_out):
    sae = trained(d_out)
    output = sae((raw_activations() - OFFSET) / SCALE)
    read = sae_lightning.load_sae(save(tmp_path / "sae", sae))
    assert_close(read(raw_activations()).features, output.features, rtol=1e-5, atol=1e-5)
    assert_close(read(raw_activations()).reconstruction, output.reconstruction - 1)


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
    """Change entries of cfg.json; None takes one out."""
    cfg = json.loads((folder / CFG).read_text()) | changes
    write_json(folder / CFG, {key: value for key, value in cfg.items() if value is not None})


@torch.no_grad()
@pytest.mark.parametrize("said", [True, None])
def test_an_encoder_that_reads_x_minus_b_dec_is_honoured(tmp_path, said):
    """f = relu((x - b_dec) W_enc + b_enc), which is also what SAELens means by saying nothing."""
    sae = load_sae(save(tmp_path, trained()))
    rewrite_cfg(tmp_path, apply_b_dec_to_input=said)
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


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "holds no saved SAE: give a run folder"),
        (lambda f: (f / CFG).unlink(), "holds no saved SAE: give a run folder"),
        (lambda f: cut(f / WEIGHTS), "is damaged or not an SAE"),
        (lambda f: cut(f / CFG), "is damaged or not an SAE"),
        (lambda f: (f / CFG).write_text("[]"), "is damaged or not an SAE"),
        (lambda f: save_file({"w": torch.ones(2)}, f / WEIGHTS), "not an SAE: it holds w"),
        (
            lambda f: rewrite_cfg(f, architecture="crosscoder"),
            r"architecture 'crosscoder' is not one that this version reads \(.*standard",
        ),
        (
            lambda f: rewrite_cfg(f, normalize_activations="layer_norm"),
            "fold normalize_activations into the weights first",
        ),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(tmp_path, harm, message):
    harm(save(tmp_path, trained()))
    with pytest.raises(UserError, match=message):
        load_sae(tmp_path)


def test_a_path_that_is_a_file_or_nothing_says_what_to_give(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "nothing"):
        with pytest.raises(UserError, match=f"{name} holds no saved SAE: give a run folder"):
            load_sae(tmp_path / name)


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


SAELENS_READS = """
import sys, torch
from sae_lens import SAE
folder, x = sys.argv[1], torch.load(sys.argv[2])
sae = SAE.load_from_disk(folder)
with torch.no_grad():
    f = sae.encode(x)
    torch.save((f, sae.decode(f), sae(x)), sys.argv[3])
"""
SAELENS_WRITES = """
import sys, torch
from sae_lens import StandardSAE, StandardSAEConfig
folder, x = sys.argv[1], torch.load(sys.argv[2])
config = StandardSAEConfig(d_in=x.shape[1], d_sae=40, dtype="float32", device="cpu")
assert config.apply_b_dec_to_input
sae = StandardSAE(config)
torch.manual_seed(0)
with torch.no_grad():
    for parameter in sae.parameters():
        parameter.normal_()
    sae.save_model(folder)
    f = sae.encode(x)
    torch.save((f, sae.decode(f), sae(x)), sys.argv[3])
"""


def saelens(script: str, folder, tmp_path):
    """What SAELens makes of the raw activations: features, decoded, and its forward pass."""
    torch.save(raw_activations(), tmp_path / "x.pt")
    files = [str(folder), str(tmp_path / "x.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *files], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "out.pt")


def assert_agree(sae: SAE, theirs) -> None:
    """Equal to a relative 1e-5 of the largest value (float32 sums in another order)."""
    output = sae(raw_activations())
    for mine, other in zip((output.features, *[output.reconstruction] * 2), theirs, strict=True):
        assert other.abs().max() > 1
        assert_close(mine, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
    assert torch.equal(output.features > 1e-3, theirs[0] > 1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_saelens_opens_the_folder_and_agrees(tmp_path):
    save(tmp_path / "sae", trained(), model_name="gpt2", hook_name="blocks.3.hook_resid_post")
    theirs = saelens(SAELENS_READS, tmp_path / "sae", tmp_path)
    assert_agree(load_sae(tmp_path / "sae"), theirs)
    # and both do what was trained, on normalised activations
    assert_close(theirs[2], trained()((raw_activations() - OFFSET) / SCALE).reconstruction - 1)


@pytest.mark.slow
@torch.no_grad()
def test_a_folder_that_saelens_wrote_is_read_and_agrees(tmp_path):
    theirs = saelens(SAELENS_WRITES, tmp_path / "sae", tmp_path)
    assert_agree(load_sae(tmp_path / "sae"), theirs)
