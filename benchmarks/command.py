"""Shared by the benchmarks: errors in one line, and jobs as `train.py` makes them."""

import sys
from collections.abc import Callable, Collection
from pathlib import Path

from hydra import compose, initialize_config_dir

from sae_lightning.errors import UserError
from sae_lightning.runs.cli import explain_error
from sae_lightning.runs.config import find_conf_folder
from sae_lightning.runs.jobs import Job, make_job
from sae_lightning.runs.schemas import register_schemas


def run_command(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the command line; errors that the user can fix take one line."""
    try:
        main(sys.argv[1:])
    except Exception as error:
        line = explain_error(error, [])
        if line is None:
            raise
        sys.exit(f"error: {line}")


def split_options(
    command_line: list[str], flag: str, names: Collection[str]
) -> tuple[bool, dict[str, str], list[str]]:
    """Split a command line: whether `flag` is there, the options with these names, and the
    overrides for `train.py`. UserError for an argument that is none of these."""
    options = dict(a.split("=", 1) for a in command_line if a.partition("=")[0] in names)
    overrides = [a for a in command_line if a != flag and a.partition("=")[0] not in names]
    if stray := [a for a in overrides if "=" not in a]:
        raise UserError(f"{stray[0]}: unknown; give {flag}, {'=, '.join(names)}=, or an override")
    return flag in command_line, options, overrides


def make_jobs(runs: list[list[str]], folder: Path) -> list[Job]:
    """Make a job for each list of overrides, each in its own folder."""
    register_schemas()
    with initialize_config_dir(find_conf_folder(), version_base="1.3"):
        return [
            make_job(compose("config", overrides=overrides), folder / str(number), overrides)
            for number, overrides in enumerate(runs)
        ]
