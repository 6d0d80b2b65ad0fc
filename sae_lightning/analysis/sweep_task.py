"""`task=sweep`: rewrites the report of a sweep."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sae_lightning.analysis.task import Task
from sae_lightning.errors import UserError
from sae_lightning.report.sweep_report import write_report
from sae_lightning.runs.folders import read_sweep_runs
from sae_lightning.runs.jobs import CONFIG_FILE
from sae_lightning.runs.stable_features import add_stable_features
from sae_lightning.terminal import quote_setting, shorten_path


@dataclass(slots=True, kw_only=True)
class SweepTask(Task):
    """Write the report of a sweep again, from the metrics that its runs have saved."""

    def execute(self, given_settings: Collection[str]) -> None:
        folder = Path(self.run)
        if others := sorted({*given_settings} - {"run", "task", "plugins"}):
            raise UserError(
                f"{others[0]} has no meaning for task=sweep, which reads the metrics that each run "
                "has saved: leave it out"
            )
        if (folder / CONFIG_FILE).is_file():
            parent = quote_setting("run", shorten_path(folder.absolute().parent))
            raise UserError(
                f"{self.run} holds one run, not a sweep: leave out task=sweep to look at it, or "
                f"give the folder above it for the report of all runs there ({parent})"
            )
        write_report(folder, add_stable_features(folder, read_sweep_runs(folder)))
