"""`llm.load` is typed without a plus, comes from presets, and cannot make a run's LLM run code."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from sae_lightning.errors import UserError
from sae_lightning.runs.arguments import allow_new_dict_keys, wrap_settings_of_swept_groups
from sae_lightning.runs.config import Config, find_conf_folder
from sae_lightning.runs.jobs import CONFIG_FILE, Job, format_config, make_job, read_job
from sae_lightning.runs.schemas import register_schemas

MEMORY = {0: "20GiB", "cpu": "60GiB"}


def make(*typed: str) -> Config:
    """The config of a command line, as train.py reads it."""
    register_schemas()
    overrides = allow_new_dict_keys([*typed])
    with initialize_config_dir(find_conf_folder(), version_base="1.3"):
        return make_job(compose("config", overrides), Path("folder"), overrides).config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "load"),
    [
        ("", {}),
        ("llm.load.device_map=auto", {"device_map": "auto"}),
        ("+llm.load.device_map=auto", {"device_map": "auto"}),
        ("llm.load.max_memory={0:20GiB,cpu:60GiB}", {"max_memory": MEMORY}),
        (
            "llm.load={device_map:auto,max_memory:{0:20GiB,cpu:60GiB}}",
            {"device_map": "auto", "max_memory": MEMORY},
        ),
        (
            "llm.load.device_map={model.layers.0:0,lm_head:disk} llm.load.offload_folder=/off",
            {"device_map": {"model.layers.0": 0, "lm_head": "disk"}, "offload_folder": "/off"},
        ),
        (
            "llm.load.quantization_config={load_in_4bit:true,bnb_4bit_quant_type:nf4}",
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
        ),
    ],
)
def test_llm_load_is_typed_like_any_setting(typed, load):
    assert make(*typed.split()).llm.load == load


def test_llm_load_can_be_swept_over():
    typed = allow_new_dict_keys(["-m", "llm=gpt2,smollm2", "llm.load.device_map=auto"])
    typed = wrap_settings_of_swept_groups(typed)
    assert typed[2] == "++llm.load.device_map=choice(auto)"
    override = OverridesParser.create().parse_override("++llm.load.device_map=auto,cpu")
    assert override.is_sweep_override() and override.key_or_group == "llm.load.device_map"


def test_a_preset_can_hold_llm_load(tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "mine.yaml").write_text(
        "name: smollm2\nload:\n  device_map: {'': disk}\n  max_memory: {0: 20GiB, cpu: 60GiB}\n"
    )
    config = make(
        f"hydra.searchpath=[file://{tmp_path}]", "llm=mine", "layer.index=1", "llm.load.variant=x"
    )
    assert config.llm.load == {"device_map": {"": "disk"}, "max_memory": MEMORY, "variant": "x"}
    assert config.to_flat_dict()["llm.load.max_memory.0"] == "20GiB"


def test_the_folder_of_weights_on_disk_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make("llm.load.offload_folder=off").llm.load["offload_folder"] == str(tmp_path / "off")


def test_a_strangers_run_cannot_make_transformers_run_code(tmp_path):
    job = Job(config=make(), folder=tmp_path)
    job.config.llm.load["use_kernels"] = True
    (tmp_path / CONFIG_FILE).write_text(format_config(job))
    with pytest.raises(UserError, match=r"llm\.load\.use_kernels: not passed on to .*"):
        read_job(tmp_path)


def test_runs_whose_llm_is_quantised_otherwise_share_no_pass_of_it():
    keys = [
        make(*typed.split()).stream_key()
        for typed in ("", "llm.load.quantization_config={load_in_8bit:true}")
    ]
    assert keys[0] != keys[1]
