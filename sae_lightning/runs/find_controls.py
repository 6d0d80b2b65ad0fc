"""Finds the controls that a sweep has trained beside an SAE."""

from pathlib import Path

from sae_lightning.errors import UserError
from sae_lightning.report.experiments import identify_experiment
from sae_lightning.runs.folders import read_metrics
from sae_lightning.runs.jobs import CONFIG_FILE, read_job
from sae_lightning.sae.controls import Control


def find_controls(folder: Path) -> dict[Control, Path]:
    """Control -> folder of a finished run of this control, among the runs beside `folder` (those of
    its sweep). Of several, one with the same seeds as the SAE in `folder` is preferred."""
    # trusted, because only configs are read: no code that comes with an LLM can run
    config = read_job(folder, trusted=True).config
    settings = config.to_flat_dict()
    experiment = identify_experiment(settings)  # the same for an SAE and its controls
    folders: dict[Control, Path] = {}
    for file in sorted(folder.absolute().parent.glob(f"*/{CONFIG_FILE}")):
        try:
            other = read_job(file.parent, trusted=True).config
        except UserError:  # a damaged run must not hide other runs
            continue
        control, other_settings = other.model.control, other.to_flat_dict()
        if control is None or read_metrics(file.parent) is None:  # no control, or not finished
            continue
        # with another data.seed, synthetic data has other concepts
        same_data = other_settings.get("data.seed") == settings.get("data.seed")
        if not same_data or identify_experiment(other_settings) != experiment:
            continue
        same_seeds = (other.seed, other.model.seed) == (config.seed, config.model.seed)
        if same_seeds or control not in folders:
            folders[control] = file.parent
    return folders
