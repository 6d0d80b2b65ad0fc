"""Opens SAEs for `task=export`, and writes them in the formats that hold weights."""

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sae_lightning.analysis.task import Task
from sae_lightning.errors import UserError
from sae_lightning.formats.format import Origin
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.formats.saelens import OWN_KEY
from sae_lightning.formats.trained_on import find_origin
from sae_lightning.formats.write_sae import write_sae
from sae_lightning.runs.config import Config
from sae_lightning.runs.jobs import (
    CONFIG_FILE,
    TRUST_SETTING,
    is_sweep,
    list_run_folders,
    read_job,
)
from sae_lightning.sae import SAE
from sae_lightning.terminal import phase

# Settings that all transcoders of a set must share.
SHARED_IN_SET = ("llm.name", "layer.source", "layer.target")
SHARED_IN_SET += ("model.name", "model.features", "model.k", "model.skip")


class ExportedSAE(NamedTuple):
    """An SAE to write, and what it was trained on."""

    sae: SAE
    origin: Origin


def open_one(name: str, task: Task, given_settings: Collection[str]) -> ExportedSAE:
    """Open the SAE, without its LLM, for the format `name`. UserError for the folder of a sweep."""
    if is_sweep(Path(task.run)):
        raise UserError(
            f"run={task.run} holds a sweep, and format={name} one SAE: give one of the run "
            "folders in it"
        )
    return _read_exported(task, task.run, given_settings)


def _read_exported(task: Task, run: str, given_settings: Collection[str]) -> ExportedSAE:
    """Open the SAE in `run`; `llm` and `layer`, if given, replace those in its metadata."""
    sae = load_sae(run)
    metadata, groups = sae.metadata, {name.split(".")[0] for name in given_settings}
    if {"llm", "llm.name"} & {*given_settings}:
        # the run's config, under OWN_KEY, names the old LLM
        metadata = metadata | {"model_name": task.llm.name, OWN_KEY: None}
    layer = task.layer if "layer" in groups else None
    return ExportedSAE(sae, find_origin(metadata, run, layer))


def write_one(name: str, exported: ExportedSAE, folder: Path) -> None:
    """Write one SAE in the format `name`."""
    write_sae(name, exported.sae, exported.origin, folder)


def find_blocks(
    name: str, task: Task, given_settings: Collection[str]
) -> dict[int, tuple[Path, Config]]:
    """Find the block that the SAE of each run reads, in a sweep or one run folder: block -> run
    folder and config. UserError, for the format `name`, if two runs read the same block."""
    folder, blocks = Path(task.run), {}
    for run in list_run_folders(folder) if is_sweep(folder) else [folder]:
        # Python code that comes with the run's LLM runs only if the user allows it
        config = read_job(run, trusted=TRUST_SETTING in given_settings).config
        block = config.layer.index
        if block in blocks:
            first, _ = blocks[block]
            raise UserError(
                f"run={task.run}: {first.name} and {run.name} both read block {block}, and "
                f"format={name} holds one SAE of each: move one away"
            )
        blocks[block] = run, config
    return blocks


Openers = list[Callable[[], ExportedSAE]]
"""Functions that open one SAE each, called one by one so that only one SAE is in memory."""


def open_set(name: str, task: Task, given_settings: Collection[str]) -> Openers:
    """Find the transcoders of a sweep, one for each block of the LLM, and return functions that
    open them. UserError if a block has none or several, or if they differ in SHARED_IN_SET."""
    folder = Path(task.run)
    if not is_sweep(folder) and not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"run={task.run}: format={name} takes a transcoder for every block: give the "
            "folder of a sweep over layer.index"
        )
    if layer_settings := sorted(s for s in given_settings if s.split(".")[0] == "layer"):
        raise UserError(
            f"{layer_settings[0]} has no meaning for a set, whose runs say where they read: leave "
            "it out"
        )
    blocks = find_blocks(name, task, given_settings)
    shared: dict[str, Any] = {}
    for run, config in blocks.values():
        settings = config.to_flat_dict()
        for setting in SHARED_IN_SET:
            value = settings.get(setting)
            if shared.setdefault(setting, value) != value:
                raise UserError(
                    f"run={task.run}: {setting} is {shared[setting]} in one run and {value} "
                    f"in {run.name}, and must be the same in all transcoders of a set"
                )
    _, config = next(iter(blocks.values()))  # any of the runs, as all have the same LLM
    layers = config.data_source.read_shape().layers
    if missing := sorted({*range(layers)} - {*blocks}):
        indices = ",".join(map(str, missing))
        raise UserError(
            f"run={task.run} has no transcoder for {len(missing)} of {layers} blocks, and a set "
            f"needs all: train them with -m layer=transcoder layer.index={indices}"
        )
    run_folders = [run for _, (run, _) in sorted(blocks.items())]
    return [partial(_read_exported, task, str(run), given_settings) for run in run_folders]


def write_set(name: str, openers: Openers, folder: Path) -> None:
    """Write a set of transcoders in the format `name`, opening one at a time."""
    with phase("writing transcoders", total=len(openers)) as advance:
        for open_exported in openers:
            write_one(name, open_exported(), folder)
            advance()
