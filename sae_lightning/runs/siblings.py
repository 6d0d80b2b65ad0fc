"""Finds the controls that a sweep has trained beside an SAE."""

from pathlib import Path

from sae_lightning.errors import UserError
from sae_lightning.report.experiments import identify_experiment
from sae_lightning.runs.folders import read_metrics
from sae_lightning.runs.jobs import CONFIG_FILE, read_job
from sae_lightning.sae.controls import Control


def find_controls(folder: Path) -> dict[Control, Path]:
    """Control -> its finished run folder, for the SAE of the run in `folder`: one of each kind,
    among the runs beside it (those of its sweep), with the same seed if there is one."""
    config = read_job(folder, trusted=True).config  # no LLM is loaded
    own, found = config.to_flat_dict(), {}
    experiment = identify_experiment(own)
    for file in sorted(folder.absolute().parent.glob(f"*/{CONFIG_FILE}")):
        try:
            other = read_job(file.parent, trusted=True).config
        except UserError:  # a damaged run must not stand in the way of its neighbours
            continue
        its = other.to_flat_dict()
        same = identify_experiment(its) == experiment
        same &= its.get("data.seed") == own.get("data.seed")  # otherwise it knows other concepts
        if not same or other.model.control is None or read_metrics(file.parent) is None:
            continue
        same_seed = (other.seed, other.model.seed) == (config.seed, config.model.seed)
        if same_seed or other.model.control not in found:
            found[other.model.control] = file.parent
    return found
