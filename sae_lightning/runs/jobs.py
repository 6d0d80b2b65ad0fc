"""Jobs, made from a composed config or read from run folders."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sae_lightning.errors import UserError
from sae_lightning.llm.packaged import PACKAGED
from sae_lightning.report.sweep_table import split_overrides
from sae_lightning.runs.arguments import join_sweep_values
from sae_lightning.runs.config import RESUME_OVERRIDES, Config, to_dataclass
from sae_lightning.runs.logger_choice import change_loggers, list_destinations, resolve_loggers
from sae_lightning.runs.starts import apply_start, locate_start
from sae_lightning.runs.untrusted_yaml import OVERRIDES_KEY, read_settings, refuse_plugins
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.stream import SOURCES
from sae_lightning.stream.local_files import make_absolute
from sae_lightning.terminal import format_command, make_visible, quote_setting, shorten_path

if TYPE_CHECKING:
    from sae_lightning.training.logging import HParams

CONFIG_FILE = "config.yaml"
TRUST_SETTING = "llm.trust_remote_code"
FOLDER_HINT = "hydra.run.dir=... (of a sweep: hydra.sweep.dir=...)"


@dataclass(kw_only=True)
class Job:
    """One run to train: its config, its folder, and the overrides that the user typed."""

    config: Config
    folder: Path
    overrides: list[str] = field(default_factory=list)
    resumed: bool = False
    """Whether the run began earlier: it goes on from its checkpoint, if it has one."""
    multirun: bool = False
    """Whether the job belongs to a multirun: if it fails, other jobs go on."""
    sweep_folder: Path | None = None
    """Folder of the job's sweep if all jobs of the sweep are trained together; else None."""
    swept: Sequence[str] = ()
    """Names of the settings that vary in its multirun (see `read_swept_settings`)."""
    hparams: "HParams | None" = None
    """Content of TensorBoard's HParams tab, set once all jobs of the command are known."""

    @property
    def trust_overrides(self) -> dict[str, str]:
        """The settings that every command on this run must repeat: they allow code of the LLM or of
        plugins to run, and a run folder alone may not allow that."""
        for_llm = {TRUST_SETTING: "true"} if self.config.llm.trust_remote_code else {}
        names = ",".join(self.config.plugins)
        return for_llm | ({"plugins": f"[{names}]"} if names else {})

    @property
    def label(self) -> str:
        """Name of the job in messages: in a sweep, its folder; otherwise, its overrides."""
        text = ",".join(self.overrides) or self.config.model.name
        return make_visible(self.folder.name if self.sweep_folder else text)


def read_overrides(hydra: DictConfig) -> list[str]:
    """The typed overrides as text, unresolved: their interpolations refer to the run's config, not
    to Hydra's."""
    return OmegaConf.to_container(hydra.overrides.task, resolve=False)


def read_swept_settings(hydra: DictConfig) -> list[str]:
    """Names of the typed settings that vary in a multirun, after which its folders are named; in a
    plain run, the names of all typed settings."""
    constant = hydra.job.config.override_dirname.exclude_keys  # set by `Sweep`
    return [name for name in split_overrides(read_overrides(hydra)) if name not in constant]


def format_resume_command(jobs: Sequence[Job]) -> str:
    """The command that resumes the jobs of a pass: it names their sweep or, without one, the folder
    of each job."""
    sweep = jobs[0].sweep_folder
    folders = [sweep] if sweep else [job.folder for job in jobs]
    paths = [str(shorten_path(folder)) for folder in folders]
    settings = jobs[0].trust_overrides | list_destinations(jobs[0].config.logger)
    if not sweep and len(jobs) == 1:
        return format_command("train.py", resume=paths[0], **settings)
    return format_command("train.py", "-m", resume=join_sweep_values(paths), **settings)


def pick_run_folder(resume: str | None) -> str:
    """`hydra.run.dir`: outputs/<day>/<time>, or the run folder that is resumed. UserError if
    `resume` holds no run, or a sweep."""
    if not resume:
        return datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S")
    if is_sweep(Path(resume)):
        raise UserError(
            f"{resume} holds a sweep: continue all of it with "
            f"-m {quote_setting('resume', resume)} (and no other hydra/launcher), or give one of "
            "the run folders in it"
        )
    if not (Path(resume) / CONFIG_FILE).is_file():
        raise UserError(
            f"{resume} holds no run (no {CONFIG_FILE}): give the folder of a run, such as "
            "outputs/2026-01-31/12-00-00"
        )
    return resume


def is_sweep(folder: Path) -> bool:
    """Whether `folder` holds the run folders of a multirun."""
    return not (folder / CONFIG_FILE).exists() and any(folder.glob(f"*/{CONFIG_FILE}"))


def make_job(cfg: DictConfig, folder: Path, overrides: list[str], multirun: bool = False) -> Job:
    """The job of a composed config: a new run in `folder`, or the one that `resume` names.
    UserError for settings that cannot be used together."""
    if cfg.resume is None:
        if cfg.model.start:
            cfg = apply_start(cfg, overrides)
        config = _make_paths_absolute(to_dataclass(cfg))
        config.logger = resolve_loggers(config.logger, overrides)
        for name, value in config.to_flat_dict().items():
            if "${" in str(value):  # read_settings refuses interpolations
                raise UserError(
                    f"{name}={value}: {CONFIG_FILE} of a run cannot hold ${{; choose another name"
                )
        return Job(config=config, folder=folder, overrides=overrides, multirun=multirun)
    _refuse_other_overrides(overrides)
    resumed = read_job(Path(pick_run_folder(cfg.resume)), trusted=cfg.llm.trust_remote_code)
    return _change_job(replace(resumed, resumed=True, multirun=multirun), cfg, overrides)


def make_composed_job(cfg: DictConfig) -> Job:
    """The job that Hydra is running now, from its composed config."""
    hydra = HydraConfig.get()
    multirun = hydra.mode is RunMode.MULTIRUN
    job = make_job(cfg, Path(hydra.runtime.output_dir), read_overrides(hydra), multirun)
    job.swept = read_swept_settings(hydra)
    return job


def make_jobs(cfg: DictConfig, folder: Path, overrides: list[str], sweep_folder: Path) -> list[Job]:
    """The jobs of one composed config of a multirun: one job or, if `resume` names a sweep, all
    jobs of that sweep. `sweep_folder`: the folder of the multirun."""
    if cfg.resume is None:
        job = make_job(cfg, folder, overrides, multirun=True)
        return [replace(job, sweep_folder=sweep_folder)]
    if is_sweep(Path(cfg.resume)):
        _refuse_other_overrides(overrides)
        jobs = read_sweep(Path(cfg.resume), trusted=cfg.llm.trust_remote_code)
        return [_change_job(replace(job, resumed=True), cfg, overrides) for job in jobs]
    return [make_job(cfg, folder, overrides, multirun=True)]  # one run, not its whole sweep


def _change_job(job: Job, cfg: DictConfig, overrides: list[str]) -> Job:
    """A resumed job with the settings of the composed config that were typed with `resume`."""
    for override in [o for o in overrides if o.startswith(RESUME_OVERRIDES)]:
        group, name = override.partition("=")[0].split(".")
        value = getattr(to_dataclass(cfg[group]), name)
        changed = replace(getattr(job.config, group), **{name: value})
        job.config = replace(job.config, **{group: changed})  # checks the setting
    loggers = to_dataclass(cfg.logger)
    job.config.logger = change_loggers(job.config.logger, loggers, overrides, job.folder)
    return job


def _refuse_other_overrides(overrides: list[str]) -> None:
    """UserError for overrides with `resume` that would change the run."""
    allowed = ("resume=", "plugins=", f"{TRUST_SETTING}=", "logger=", "logger.", *RESUME_OVERRIDES)
    others = [o for o in overrides if not o.startswith(allowed)]
    if others:
        raise UserError(
            f"resume continues a run as it was; {' '.join(others)} cannot be given with it. "
            "Start a new run to change a setting"
        )


def _make_paths_absolute(config: Config) -> Config:
    """Make paths absolute, so that the run can be resumed and analysed from another folder."""
    if config.llm.name not in PACKAGED and os.path.isdir(make_absolute(config.llm.name)):
        config.llm.name = make_absolute(config.llm.name)
    if folder := config.llm.load.get("offload_folder"):
        config.llm.load["offload_folder"] = make_absolute(folder)
    config.data = config.data.with_absolute_paths()
    if config.model.start:
        config.model.start = locate_start(config.model.start)
    return config


def read_job(folder: Path, trusted: bool = False) -> Job:
    """The job that an existing run folder describes. UserError if the config cannot be read, or
    names plugins that are not imported, or would run Python code that comes with the LLM: the
    folder may be untrusted. `trusted`: the user has allowed that code, or no LLM is loaded."""
    file = folder / CONFIG_FILE
    try:
        settings = read_settings(file)
        overrides = settings.pop(OVERRIDES_KEY, [])
        if not (isinstance(overrides, list) and all(isinstance(o, str) for o in overrides)):
            raise ValueError(f"{OVERRIDES_KEY} is not a list of overrides")
        refuse_plugins(file, settings.get("plugins", []))
        data = settings["data"]
        schema = _make_schema(data.get("kind") or _infer_data_kind(data), settings["model"]["name"])
        config = to_dataclass(OmegaConf.merge(schema, settings))
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"{file} cannot be read: {reason}") from error
    if config.llm.trust_remote_code and not trusted:
        raise UserError(
            f"{file}: {TRUST_SETTING}=true would run the Python code that comes with "
            f"{config.llm.name}: read that code first, then allow it by adding "
            f"{TRUST_SETTING}=true to this command"
        )
    return Job(config=config, folder=folder, overrides=overrides)


@cache
def _make_schema(data_kind: str, architecture: str) -> DictConfig:
    """The schema of a run's config for a kind of data and an architecture, cached for sweeps of
    many runs."""
    schema, entry = OmegaConf.structured(Config), ARCHITECTURES[architecture]
    schema.data = SOURCES[data_kind].settings
    schema.model, schema.loss = entry.config, entry.loss
    return schema


def read_sweep(folder: Path, trusted: bool = False) -> list[Job]:
    """The jobs of the run folders in the folder of a multirun, sorted by name."""
    jobs = [read_job(run, trusted) for run in list_run_folders(folder)]
    return [replace(job, multirun=True, sweep_folder=folder) for job in jobs]


def list_run_folders(sweep: Path) -> list[Path]:
    """The run folders of a multirun, sorted by name; UserError if there are none."""
    if not is_sweep(sweep):
        raise UserError(
            f"{sweep} holds no runs of a sweep: give its folder, such as "
            "multirun/2026-01-31/12-00-00"
        )
    return sorted(file.parent for file in sweep.glob(f"*/{CONFIG_FILE}"))


def format_config(job: Job) -> str:
    """The text of `config.yaml` in a run folder."""
    return OmegaConf.to_yaml(
        OmegaConf.create(job.config.to_dict() | {OVERRIDES_KEY: job.overrides})
    )


def _infer_data_kind(data: dict) -> str:
    """Infer the kind of data, which old runs did not save, from a setting that only it has."""
    for kind, setting in {"synthetic": "concepts", "local": "path", "hub": "name"}.items():
        if setting in data:
            return kind
    return "plays"
