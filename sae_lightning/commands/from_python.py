"""Training from Python, with the arguments of the command line.

run = train("model=topk", "model.k=32")
runs = train_sweep("loss.l1=1e-4,1e-3")
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig

from sae_lightning.errors import UserError
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.runs.cli import explain_error, remove_unused_folder, rewrite_arguments
from sae_lightning.runs.config import find_conf_folder
from sae_lightning.runs.folders import read_metrics
from sae_lightning.runs.jobs import make_composed_job
from sae_lightning.runs.launchers import find_launched_rank
from sae_lightning.runs.plugins import load_plugins
from sae_lightning.sae import SAE
from sae_lightning.terminal import phase


@dataclass(eq=False)
class Run:
    """A finished run, read from its folder."""

    folder: Path
    """The run folder, for `resume=...`, `analyze.py run=...` and `open_run`."""

    @property
    def metrics(self) -> dict[str, float]:
        """Held-out metrics by name, such as `l0` and `explained_variance`."""
        return read_metrics(self.folder)["held_out"]

    @cached_property
    def sae(self) -> SAE:
        """The trained SAE, for raw activations: on the CPU, frozen, in float32."""
        return load_sae(self.folder)


def train(*arguments: str, config_dir: str | os.PathLike | None = None) -> Run:
    """Train the SAE that the arguments of `train.py` describe, or go on with `resume=...`.
    `config_dir`: a folder with presets of your own. A UserError holds the line that the command
    would print."""
    (result,) = _run_hydra(arguments, config_dir, sweep=False)
    return Run(Path(result.hydra_cfg.hydra.runtime.output_dir))


def train_sweep(*arguments: str, config_dir: str | os.PathLike | None = None) -> list[Run]:
    """Train the SAEs of a sweep, `train.py -m` with these arguments, on as few passes of the LLM as
    possible. In the list, the runs that `sweep.seeds` and `sweep.controls` add follow their SAE.
    UserError: as in `train`, or because some SAEs failed; finished SAEs are in their folders."""
    results = _run_hydra(arguments, config_dir, sweep=True)
    # one_pass sets working_dir to the run folder, which appears twice if two jobs added one run
    folders = dict.fromkeys(Path(result.working_dir).absolute() for result in results)
    return [Run(folder) for folder in folders]


def _run_hydra(
    arguments: Sequence[str], config_dir: str | os.PathLike | None, sweep: bool
) -> list[JobReturn]:
    """Run Hydra with the arguments of a command line; returns the result of each job."""
    with _raise_printed_errors(arguments):
        _refuse_unsupported(arguments)
        # the flag tells load_plugins the folder of presets
        flags = [] if config_dir is None else ["--config-dir", os.fspath(config_dir)]
        settings = load_plugins([*flags, *arguments])[len(flags) :]
        if not sweep:
            overrides = [*rewrite_arguments(settings), "hydra.mode=RUN"]
            with _start_hydra(config_dir) as hydra:
                result = hydra.run("config", _train_job, overrides, with_log_configuration=False)
            if error := result.return_value:
                raise error
            return [result]
        # [1:] drops -m, for which hydra.mode stands
        overrides = [*rewrite_arguments(["-m", *settings])[1:], "hydra.mode=MULTIRUN"]
        with _start_hydra(config_dir) as hydra:  # one_pass raises the error of a job itself
            batches = hydra.multirun("config", _train_job, overrides, with_log_configuration=False)
            return [result for batch in batches for result in batch]


def _refuse_unsupported(arguments: Sequence[str]) -> None:
    """UserError for torchrun, flags, launchers and sweepers, which only the command supports."""
    if find_launched_rank():
        raise UserError(
            "train() starts the processes of trainer.devices itself: start this program once, or "
            "use the command with torchrun, srun or submitit"
        )
    for argument in arguments:
        if argument.startswith("-"):
            raise UserError(
                f"{argument}: only settings (setting=value) are given here; a sweep is "
                "train_sweep(...), a folder with presets config_dir=..."
            )
        if argument.startswith(("hydra/launcher=", "hydra/sweeper=")):
            raise UserError(
                f"{argument}: only the command takes this, because it may start other processes"
            )


@contextmanager
def _start_hydra(config_dir: str | os.PathLike | None) -> Iterator[Hydra]:
    """Start Hydra with our presets and those of `config_dir`; afterwards, restore Hydra's global
    state, which the caller may be using."""
    search_path = create_config_search_path(find_conf_folder())
    if config_dir is not None:
        folder = os.path.abspath(config_dir)
        if not os.path.isdir(folder):
            raise UserError(f"config_dir={config_dir}: no such folder")
        schema = SearchPathQuery(provider="schema")  # Hydra puts --config-dir there
        search_path.prepend("command-line", f"file://{folder}", anchor=schema)
    version.setbase("1.3")
    backup = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2("train", search_path)
    finally:
        restore_gh_from_backup(backup)


def _train_job(cfg: DictConfig) -> Exception | None:
    """Train a job; returns an error instead of raising it, because Hydra would print it."""
    try:
        job = make_composed_job(cfg)
        # imported late, so that a mistyped setting is reported at once
        with phase("starting"):
            from sae_lightning.runs.passes import train_jobs

        train_jobs([job])
    except Exception as error:
        return error
    finally:
        remove_unused_folder(Path(HydraConfig.get().runtime.output_dir))


@contextmanager
def _raise_printed_errors(arguments: Sequence[str]) -> Iterator[None]:
    """Turn an error into a UserError with the line that the command would print for it."""
    try:
        yield
    except SystemExit as exit_:
        if exit_.code == 130:  # after Ctrl-C
            raise KeyboardInterrupt from None
        if isinstance(exit_.code, str):  # runs/sweep.py exits with the line of an error
            raise UserError(exit_.code.removeprefix("error: ")) from exit_
        raise
    except Exception as error:
        line = explain_error(error, [*arguments])
        if line is None or isinstance(error, UserError):
            raise
        raise UserError(line) from error
