"""Registers with Hydra the schemas, options without a preset, launcher and resolvers that conf/
refers to."""

from collections.abc import Mapping
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from sae_lightning.runs.config import DATA_PRESETS, Config, find_conf_folder, list_presets
from sae_lightning.runs.jobs import is_sweep, pick_run_folder
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.stream import SOURCES
from sae_lightning.terminal import format_program


def register_schemas(
    tasks: Mapping[str, type] | None = None, config_dir: str | None = None
) -> None:
    """Register schemas, our launcher and resolvers with Hydra: schemas under `schema/`, so that
    users do not see them as options. An architecture, objective or kind of data that has no preset
    in conf/ or in the user's `config_dir` becomes an option of its group. `tasks`: name -> schema,
    for analyze.py."""
    store = ConfigStore.instance()
    store.store(group="schema", name="root", node=Config)
    # folders of presets: Hydra refuses a preset that has the name of a registered option
    folders = [Path(folder) for folder in (find_conf_folder(), config_dir) if folder]
    for group, table in (
        ("model", {name: entry.config for name, entry in ARCHITECTURES.items()}),
        ("loss", {name: entry.loss for name, entry in ARCHITECTURES.items()}),
        ("data", {name: entry.settings for name, entry in SOURCES.items()}),
    ):
        for name, schema in table.items():
            store.store(group=f"schema/{group}", name=name, node=schema)
            store.repo.get(group, {}).pop(f"{name}.yaml", None)  # registered by an earlier call
            has_preset = any((folder / group / f"{name}.yaml").is_file() for folder in folders)
            # our own kinds of data have presets under other names
            if not has_preset and (group != "data" or name not in DATA_PRESETS.values()):
                values = {"model": {"name": name, "seed": "${seed}"}, "data": {"kind": name}}
                node = OmegaConf.merge(schema, values.get(group, {}))
                store.store(group=group, name=name, node=node)
    for name, schema in (tasks or {}).items():
        node = OmegaConf.merge(schema, {"task": name})
        store.store(group="task", name=name, node=node, package="_global_")
    launcher = {"_target_": "hydra_plugins.one_pass_launcher.OnePassLauncher"}
    store.store(group="hydra/launcher", name="one_pass", node=launcher)
    OmegaConf.register_new_resolver("run_folder", pick_run_folder, replace=True)
    OmegaConf.register_new_resolver("sweep_folder", pick_sweep_folder, replace=True)
    OmegaConf.register_new_resolver("loss_of", pick_loss_preset, replace=True)
    OmegaConf.register_new_resolver("job_folder", name_job_folder, replace=True)
    OmegaConf.register_new_resolver("presets", list_presets, replace=True)
    OmegaConf.register_new_resolver("program", format_program, replace=True)


def pick_sweep_folder(resume: str | None, day: str, time: str) -> str:
    """`hydra.sweep.dir`: multirun/<day>/<time>, or the folder of the sweep that is resumed."""
    if resume and is_sweep(Path(resume)):
        return resume
    return f"multirun/{day}/{time}"


def pick_loss_preset(model: str) -> str:
    """The `loss` preset for a `model` preset: the preset with the same name or, if there is none,
    the preset of the model's architecture."""
    loader = GlobalHydra.instance().config_loader()
    exists = loader.repository.config_exists
    if exists(f"loss/{model}") or not exists(f"model/{model}"):  # Hydra reports an unknown name
        return model
    preset = loader.load_configuration(f"model/{model}", [], RunMode.RUN)
    name = OmegaConf.select(preset, "model.name", default="relu")
    return name if name in ARCHITECTURES else "relu"  # Config reports an unknown name


def name_job_folder(swept: str, number: int) -> str:
    """`hydra.sweep.subdir`, the name of a job's run folder in the folder of its sweep: `swept`, its
    settings as setting=value,..., or its number if nothing is swept."""
    name = swept.replace("/", "_").encode()
    if len(name) > 200:  # file systems allow 255 bytes; the number keeps names distinct
        return name[:190].decode(errors="ignore") + f"_{number}"
    return name.decode() or str(number)
