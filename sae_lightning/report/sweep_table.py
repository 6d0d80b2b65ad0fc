"""The jobs of a sweep as a table: what varied, and what came of it."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_lightning.report.figures import find_pareto_front


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
    damaged: bool = False
    """Whether a file in its folder cannot be read, as `failure` says."""

    @property
    def status(self) -> str:
        """finished, failed, damaged or unfinished."""
        if self.damaged:
            return "damaged"
        if self.failure is not None:
            return "failed"
        return "unfinished" if self.metrics is None else "finished"

    @property
    def override_values(self) -> dict[str, str]:
        """The overrides by setting."""
        return split_overrides(self.overrides)

    @property
    def final_metrics(self) -> dict[str, float]:
        """The final metrics by name: those of held-out data, then those of training."""
        metrics = self.metrics or {}
        training = metrics.get("training", {})
        return metrics.get("held_out", {}) | {
            name: training[name] for name in ("train/dead", "train/mse") if name in training
        }


class MetricColumn(NamedTuple):
    """A metric for people."""

    label: str
    template: str
    """How a number is written."""
    better: int
    """1 where more is better, -1 where less is, 0 where it depends."""
    meaning: str

    @property
    def heading(self) -> str:
        """The label, and which way is better."""
        return self.label + {1: " ↑", -1: " ↓", 0: ""}[self.better]

    def format_value(self, value: float | None) -> str:
        """A cell; a dash where there is no number."""
        return "–" if value is None else self.template.format(value)


METRIC_COLUMNS = {
    "l0": MetricColumn("L0", "{:,.1f}", 0, "active features per token"),
    "explained_variance": MetricColumn("EV", "{:.4f}", 1, "explained variance"),
    "usual_explained_variance": MetricColumn(
        "EV usual", "{:.4f}", 1, "explained variance without the few longest tokens"
    ),
    "ce_recovered": MetricColumn(
        "CE recovered",
        "{:.4f}",
        1,
        "share of what zero ablation costs the LLM that is recovered; 1 is lossless and more is no "
        "better, and where zero ablation costs nothing there is nothing to compare",
    ),
    "kl": MetricColumn("KL", "{:.4f}", -1, "from the LLM's predictions, nats per token"),
    "recovered": MetricColumn("recovered", "{:.1%}", 1, "share of concepts found (cosine > 0.9)"),
    "precision": MetricColumn("precision", "{:.4f}", 1, "of matched features as detectors"),
    "recall": MetricColumn("recall", "{:.4f}", 1, "of matched features as detectors"),
    "unfired": MetricColumn("unfired", "{:.1%}", -1, "share of features silent on held-out data"),
    "duplicates": MetricColumn(
        "copies", "{:.1%}", -1, "share of live features with another at a decoder cosine above 0.9"
    ),
    "nearest_cosine": MetricColumn(
        "nearest", "{:.2f}", 0, "median over live features of the cosine with the nearest other"
    ),
    "train/dead": MetricColumn(
        "dead", "{:.1%}", -1, "share of features dead at the end of training"
    ),
    "mse": MetricColumn("mse", "{:.4f}", -1, "mean squared error"),
}
RUN_COLUMNS = ("tokens", "status", "reason", "folder")  # columns of neither settings nor metrics


class SweepTable:
    """Runs in the order of what was swept, a row each in all of its frames."""

    def __init__(self, runs: list[SweepRun]):
        import pandas as pd  # imported late: slow, and train.py needs it only when a sweep ends

        self.keys = [
            key
            for key in find_swept([run.override_values for run in runs])
            if key not in RUN_COLUMNS
        ]
        """The settings in which the runs differ."""
        self.runs = sorted(
            runs, key=lambda run: [*map(make_natural_key, self._read_swept(run).values())]
        )
        numbers = dict.fromkeys(name for run in self.runs for name in run.final_metrics)
        records = [
            run.final_metrics
            | self._read_swept(run)
            | {"status": run.status, "reason": run.failure, "folder": run.folder.name}
            | {"tokens": (run.metrics or {}).get("tokens")}
            for run in self.runs
        ]
        # a damaged file may use a name twice
        names = [*dict.fromkeys([*self.keys, *numbers, *RUN_COLUMNS])]
        rows = [[record.get(name) for name in names] for record in records]
        # as objects, for which None, a missing number, is not the same as NaN, a measured one
        self.frame = pd.DataFrame(rows, columns=names, dtype=object)
        """`keys`, every metric by its own name, tokens, status, reason and folder."""
        self.columns = {name: column for name, column in METRIC_COLUMNS.items() if name in numbers}
        self.is_finished = self.frame.status == "finished"
        values = self.frame.reindex(columns=[*METRIC_COLUMNS, "ce_zero", "ce_clean"]).astype(float)
        values["ce_recovered"] = cap_recovered(values.ce_recovered, values.ce_zero, values.ce_clean)
        values = values[list(METRIC_COLUMNS)]
        self.finite = values.where(np.isfinite(values).mul(self.is_finished, axis=0))
        """What can be compared: the finite metrics of finished runs, NaN for others."""
        better = pd.Series({name: column.better for name, column in METRIC_COLUMNS.items()})
        signed = self.finite * better
        self.best = (signed == signed.max()) & (better != 0)
        """Whether no finished run is better in a metric."""
        self.front = find_pareto_front(self.finite["l0"], self.finite["explained_variance"])

    def _read_swept(self, run: SweepRun) -> dict[str, str]:
        return {
            key: run.override_values.get(key, str(run.settings.get(key, ""))) for key in self.keys
        }

    @property
    def names(self) -> list[str]:
        """What distinguishes each run, for messages."""
        swept = self.frame[self.keys].to_dict("records")
        pairs = [", ".join(f"{key}={value}" for key, value in row.items()) for row in swept]
        return pairs if self.keys else [*self.frame.folder]

    def count_runs(self, status: str) -> int:
        """How many runs have this status."""
        return int((self.frame.status == status).sum())


def split_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """What was typed, such as `loss.l1=0.001`, by setting."""
    pairs = (override.lstrip("+").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def find_swept(typed: Sequence[dict[str, str]]) -> list[str]:
    """The settings that were typed with several values, in the order typed."""
    keys = dict.fromkeys(key for each in typed for key in each)
    return [key for key in keys if len({each.get(key) for each in typed}) > 1]


def cap_recovered(share: Any, ce_zero: Any, ce_clean: Any) -> Any:
    """CE recovered as runs are compared by it: more than 1 says that the LLM likes reconstructions
    better than activations, not that they are nearer; NaN where zero ablation costs nothing, so
    that a share of it has no meaning."""
    return np.where(ce_zero <= ce_clean, np.nan, np.minimum(share, 1))


def make_natural_key(value: str) -> tuple[bool, float, str]:
    """A key to sort by: numbers by value, before words."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    return (True, 0.0, value) if math.isnan(number) else (False, number, value)
