"""Look at what training found: python analyze.py run=outputs/<day>/<time>"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from sae_lightning.analysis.evaluate import evaluate
from sae_lightning.analysis.sweep_report import write_report
from sae_lightning.cli import one_line_errors
from sae_lightning.config import AnalyzeConfig, typed
from sae_lightning.errors import UserError
from sae_lightning.export import load_sae
from sae_lightning.folders import sweep_runs
from sae_lightning.inputs import open_held_out, shape
from sae_lightning.jobs import CONFIG_FILE, is_sweep, read_job, register, run_folder
from sae_lightning.llm.sites import distinct
from sae_lightning.terminal import shown


def _evaluate(asked: AnalyzeConfig) -> None:
    """Score the SAE of a run folder, with the run's own LLM and held-out text."""
    folder = Path(asked.run)
    if is_sweep(folder):
        raise UserError(
            f"{asked.run} holds a sweep: give one of the run folders in it, or task=sweep for the "
            "report of all"
        )
    config = read_job(Path(run_folder(asked.run))).config
    sae = load_sae(folder)
    sites = config.layer.within(shape(config).layers)
    evaluate(folder, sae, open_held_out(config, distinct([sites]), asked.tokens), sites)


def _sweep(asked: AnalyzeConfig) -> None:
    """Write and print the report of a multirun again."""
    folder = Path(asked.run)
    if (folder / CONFIG_FILE).is_file():
        above = shown(folder.absolute().parent)
        raise UserError(
            f"{asked.run} holds one run, no sweep: leave out task=sweep to evaluate it, or give "
            f"the folder above it for the report of all runs there (run={above})"
        )
    write_report(folder, sweep_runs(folder))


TASKS = {"evaluate": _evaluate, "sweep": _sweep}


@hydra.main(version_base="1.3", config_path="conf", config_name="analyze")
def analyze(cfg: DictConfig) -> None:
    """Run one task on one folder."""
    with one_line_errors():
        asked = typed(cfg)
        if asked.task not in TASKS:
            raise UserError(f"task={asked.task}: no such task; choose from {', '.join(TASKS)}")
        TASKS[asked.task](asked)


if __name__ == "__main__":
    register()
    with one_line_errors():
        analyze()
