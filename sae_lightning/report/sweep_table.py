"""The jobs of a sweep as a table: what varied, and what came of it."""

import math
from pathlib import Path
from typing import NamedTuple

from sae_lightning.report.pareto import pareto


class SweepRun(NamedTuple):
    """One job of a sweep, as its folder tells."""

    folder: Path
    """Run folder."""
    overrides: list[str]
    """What the user typed, such as `loss.l1=0.001`."""
    metrics: dict | None
    """Content of metrics.json; None if the job did not come to its end."""
    failure: str | None
    """Why it failed; None if it did not."""
    settings: dict[str, object] = {}
    """Every setting by its dotted name, for the page's heading."""

    @property
    def status(self) -> str:
        """finished, failed or unfinished."""
        if self.failure is not None:
            return "failed"
        return "unfinished" if self.metrics is None else "finished"

    @property
    def typed(self) -> dict[str, str]:
        """The overrides by setting."""
        pairs = (override.lstrip("+").partition("=") for override in self.overrides)
        return {key: value for key, _, value in pairs}

    @property
    def numbers(self) -> dict[str, float]:
        """The final metrics by name: those of held-out data, then those of training."""
        if self.metrics is None:
            return {}
        training = self.metrics.get("training", {})
        return self.metrics.get("held_out", {}) | {
            name: training[name] for name in ("train/dead", "train/mse") if name in training
        }

    @property
    def tokens(self) -> int | None:
        """Training tokens; None if the job did not come to its end."""
        return None if self.metrics is None else self.metrics.get("tokens")


class Column(NamedTuple):
    """A metric for people."""

    label: str
    form: str
    """How a number is written."""
    better: int
    """1 where more is better, -1 where less is, 0 where it depends."""
    meaning: str

    @property
    def heading(self) -> str:
        """The label, and which way is better."""
        return self.label + {1: " ↑", -1: " ↓", 0: ""}[self.better]

    def written(self, value: float | None) -> str:
        """A cell; a dash where there is no number."""
        return "–" if value is None else self.form.format(value)


COLUMNS = {
    "l0": Column("L0", "{:,.1f}", 0, "active features per token"),
    "explained_variance": Column("EV", "{:.4f}", 1, "explained variance"),
    "ce_recovered": Column("CE recovered", "{:.4f}", 1, "share of the LLM's loss recovered"),
    "kl": Column("KL", "{:.4f}", -1, "from the LLM's predictions, nats per token"),
    "recovered": Column("recovered", "{:.1%}", 1, "share of concepts found (cosine > 0.9)"),
    "precision": Column("precision", "{:.4f}", 1, "of matched features as detectors"),
    "recall": Column("recall", "{:.4f}", 1, "of matched features as detectors"),
    "unfired": Column("unfired", "{:.1%}", -1, "share of features silent on held-out data"),
    "train/dead": Column("dead", "{:.1%}", -1, "share of features dead at the end of training"),
    "mse": Column("mse", "{:.4f}", -1, "mean squared error"),
}


class SweepTable:
    """Runs in the order of what was swept; `keys` are the settings in which they differ."""

    def __init__(self, runs: list[SweepRun]):
        typed = list(dict.fromkeys(key for run in runs for key in run.typed))
        self.keys = [key for key in typed if len({run.typed.get(key) for run in runs}) > 1]
        self.runs = sorted(runs, key=lambda run: [natural(value) for value in self.swept(run)])
        self.columns = {
            name: column
            for name, column in COLUMNS.items()
            if any(name in run.numbers for run in runs)
        }
        finished = [run for run in self.runs if run.status == "finished"]
        points = [
            (run.numbers.get("l0", math.nan), run.numbers.get("explained_variance", math.nan))
            for run in finished
        ]
        self.front = {finished[i].folder for i in pareto(points)}
        self.best = {
            name: max(
                (
                    column.better * run.numbers[name]
                    for run in finished
                    if math.isfinite(run.numbers.get(name, math.nan))
                ),
                default=None,
            )
            for name, column in self.columns.items()
            if column.better
        }

    def swept(self, run: SweepRun) -> list[str]:
        """The values of `keys`."""
        return [run.typed.get(key, str(run.settings.get(key, ""))) for key in self.keys]

    def name(self, run: SweepRun) -> str:
        """What distinguishes a run, for messages."""
        pairs = zip(self.keys, self.swept(run), strict=True)
        return ", ".join(f"{key}={value}" for key, value in pairs) or run.folder.name

    def is_best(self, run: SweepRun, name: str) -> bool:
        """Whether no finished run is better in the metric `name`."""
        if run.status != "finished" or self.best.get(name) is None or name not in run.numbers:
            return False
        return self.columns[name].better * run.numbers[name] == self.best[name]

    def count(self, status: str) -> int:
        """How many runs finished, failed or are unfinished."""
        return sum(run.status == status for run in self.runs)

    def records(self) -> list[dict[str, object]]:
        """A dict for each run with full names and precision; missing numbers are missing."""
        return [
            dict(zip(self.keys, self.swept(run), strict=True))
            | run.numbers
            | {
                "tokens": run.tokens,
                "status": run.status,
                "reason": run.failure,
                "folder": run.folder.name,
            }
            for run in self.runs
        ]


def natural(value: str) -> tuple[bool, float, str]:
    """A key to sort by: numbers by value, before words."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    return (True, 0.0, value) if math.isnan(number) else (False, number, value)
