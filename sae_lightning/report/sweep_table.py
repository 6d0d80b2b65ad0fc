"""The runs of a sweep as a table: swept settings and metrics."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class SweepRun(NamedTuple):
    """One run of a sweep, read from its folder."""

    folder: Path
    overrides: list[str]
    """The user's overrides, such as `loss.l1=0.001`."""
    metrics: dict | None
    """Content of metrics.json; None if the run did not finish."""
    failure: str | None
    """Why it failed; None if it did not."""
    settings: dict[str, object] = {}
    """Dotted name -> value of every setting; empty if they cannot be read."""
    damaged: bool = False
    """Whether a file in the folder cannot be read; `failure` says which."""
    stable: float | None = None
    """Share of the SAE's live features that SAEs with other seeds have as well; None if not
    measured."""

    @property
    def status(self) -> str:
        """One of finished, failed, damaged and unfinished."""
        if self.damaged:
            return "damaged"
        if self.failure is not None:
            return "failed"
        return "unfinished" if self.metrics is None else "finished"

    @property
    def override_values(self) -> dict[str, str]:
        """Name of an overridden setting -> its value, as typed."""
        return split_overrides(self.overrides)

    @property
    def final_metrics(self) -> dict[str, float]:
        """Final metrics by name: those on held-out data, two from training and, where they exist,
        `ce_gap_closed` (by loss.kl), `stayed` (after a warm start) and `stable`."""
        metrics = self.metrics or {}
        training = metrics.get("training", {})
        final = metrics.get("held_out", {}) | {
            name: training[name] for name in ("train/dead", "train/mse") if name in training
        }
        if "before_kl" in metrics:
            closed = measure_gap_closed(metrics["before_kl"], metrics["held_out"])
            final |= {} if closed is None else {"ce_gap_closed": closed}
        fates = metrics.get("fates", {})  # after a warm start: counts of features
        live_at_start = sum(fates.get(name, 0) for name in ("stayed", "moved", "died"))
        final |= {"stayed": fates["stayed"] / live_at_start} if live_at_start else {}
        return final | ({} if self.stable is None else {"stable": self.stable})


class MetricColumn(NamedTuple):
    """How the table shows a metric."""

    label: str
    template: str
    better: int
    """1: higher is better, -1: lower is better, 0: neither."""
    meaning: str

    @property
    def header(self) -> str:
        """The label with an arrow in the better direction."""
        return self.label + {1: " ↑", -1: " ↓", 0: ""}[self.better]

    def format_value(self, value: float | None) -> str:
        """Format a cell; a dash if there is no number."""
        return "–" if value is None else self.template.format(value)


METRIC_COLUMNS = {
    "l0": MetricColumn("L0", "{:,.1f}", 0, "active features per token"),
    "explained_variance": MetricColumn("EV", "{:.4f}", 1, "explained variance"),
    "usual_explained_variance": MetricColumn(
        "EV usual", "{:.4f}", 1, "explained variance without the few tokens of largest norm"
    ),
    "ce_recovered": MetricColumn(
        "CE recovered",
        "{:.4f}",
        1,
        "share of the cross-entropy lost by zero ablation that reconstructions recover; 1 is "
        "lossless, more is no better, and it is undefined where zero ablation loses nothing",
    ),
    "kl": MetricColumn(
        "KL", "{:.4f}", -1, "KL divergence from the LLM's predictions, in nats per token"
    ),
    "ce_gap_closed": MetricColumn(
        "CE gap closed",
        "{:.1%}",
        1,
        "of the cross-entropy that the SAE adds, the share that training with loss.kl removed",
    ),
    "recovered": MetricColumn(
        "recovered", "{:.1%}", 1, "share of concepts with a feature at cosine > 0.9"
    ),
    "precision": MetricColumn(
        "precision", "{:.4f}", 1, "of matched features as detectors of their concepts"
    ),
    "recall": MetricColumn(
        "recall", "{:.4f}", 1, "of matched features as detectors of their concepts"
    ),
    "unfired": MetricColumn(
        "unfired", "{:.1%}", -1, "share of features that never fire on held-out data"
    ),
    "duplicates": MetricColumn(
        "copies",
        "{:.1%}",
        -1,
        "share of live features with a copy: another at a decoder cosine above 0.9",
    ),
    "nearest_cosine": MetricColumn(
        "nearest",
        "{:.2f}",
        0,
        "median over live features of the largest decoder cosine with another",
    ),
    "train/dead": MetricColumn(
        "dead", "{:.1%}", -1, "share of features dead at the end of training"
    ),
    "stayed": MetricColumn(
        "stayed",
        "{:.1%}",
        0,
        "of the features that fired at the warm start, share that still fire and whose decoder row "
        "has kept a cosine above 0.9",
    ),
    "stable": MetricColumn(
        "stable",
        "{:.1%}",
        1,
        "share of live features that the SAE of another seed has too: decoder rows matched one to "
        "one at a cosine above 0.7",
    ),
    "mse": MetricColumn("mse", "{:.4f}", -1, "mean squared error"),
}
RUN_COLUMNS = ("tokens", "status", "reason", "folder")  # neither settings nor metrics


class SweepTable:
    """Runs sorted by their swept values; every frame and series has one row per run."""

    def __init__(self, runs: list[SweepRun]):
        import pandas as pd  # imported late: slow, and train.py needs it only when a sweep ends

        swept = find_swept([run.override_values for run in runs])
        self.keys = [key for key in swept if key not in RUN_COLUMNS]
        """Names of the settings in which the runs differ."""
        self.runs = sorted(
            runs, key=lambda run: [*map(make_natural_key, self._read_swept(run).values())]
        )
        measured = dict.fromkeys(name for run in self.runs for name in run.final_metrics)
        records = [
            run.final_metrics
            | self._read_swept(run)
            | {"status": run.status, "reason": run.failure, "folder": run.folder.name}
            | {"tokens": (run.metrics or {}).get("tokens")}
            for run in self.runs
        ]
        # a damaged file may repeat a name
        names = [*dict.fromkeys([*self.keys, *measured, *RUN_COLUMNS])]
        rows = [[record.get(name) for name in names] for record in records]
        # dtype object keeps None (missing) apart from NaN (measured)
        self.frame = pd.DataFrame(rows, columns=names, dtype=object)
        """Columns: `keys`, all metrics by name, then RUN_COLUMNS."""
        self.metrics = [name for name in measured if name not in {*self.keys, *RUN_COLUMNS}]
        """Names of all metrics that a run has."""
        self.columns = {name: column for name, column in METRIC_COLUMNS.items() if name in measured}
        """Those of METRIC_COLUMNS that a run has."""
        self.is_finished = self.frame.status == "finished"
        values = self.frame.reindex(columns=[*METRIC_COLUMNS, "ce_zero", "ce_clean"]).astype(float)
        values["ce_recovered"] = cap_recovered(values.ce_recovered, values.ce_zero, values.ce_clean)
        values = values[list(METRIC_COLUMNS)]
        is_comparable = np.isfinite(values).mul(self.is_finished, axis=0)
        self.comparable_metrics = values.where(is_comparable)
        """Finite metrics of finished runs, CE recovered capped at 1; NaN elsewhere."""

    def _read_swept(self, run: SweepRun) -> dict[str, str]:
        """Each of `keys` -> its value in the run: as typed, or else as saved; "" if unknown."""
        return {
            key: run.override_values.get(key, str(run.settings.get(key, ""))) for key in self.keys
        }

    @property
    def names(self) -> list[str]:
        """Names of the runs: swept settings such as `loss.l1=0.001`, or folders if none is."""
        swept = self.frame[self.keys].to_dict("records")
        pairs = [", ".join(f"{key}={value}" for key, value in row.items()) for row in swept]
        return pairs if self.keys else [*self.frame.folder]

    def count_runs(self, status: str) -> int:
        """Number of runs with a status."""
        return int((self.frame.status == status).sum())


def split_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """Split overrides such as `loss.l1=0.001` into setting -> value."""
    pairs = (override.lstrip("+").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def find_swept(overrides: Sequence[dict[str, str]]) -> list[str]:
    """Find the settings with several values among the `overrides` of runs, in the order typed."""
    keys = dict.fromkeys(key for values in overrides for key in values)
    return [key for key in keys if len({values.get(key) for values in overrides}) > 1]


def cap_recovered(share: Any, ce_zero: Any, ce_clean: Any) -> Any:
    """Cap CE recovered at 1 for comparing runs: above 1 the LLM predicts better from
    reconstructions than from activations, which does not make them more faithful. NaN where zero
    ablation does not increase the CE, because there is nothing to recover. For numbers, or
    elementwise for series."""
    return np.where(ce_zero <= ce_clean, np.nan, np.minimum(share, 1))


def measure_gap_closed(before: dict[str, float], after: dict[str, float]) -> float | None:
    """Compute which share of the CE gap, CE with the SAE in place minus CE of the LLM, was closed.
    `before` and `after`: held-out metrics; None if there was no gap."""
    gap = before["ce_spliced"] - before["ce_clean"]
    return (before["ce_spliced"] - after["ce_spliced"]) / gap if gap > 0 else None


def make_natural_key(value: str) -> tuple[bool, float, str]:
    """Make a sort key that puts numbers, by value, before words: (is a word, number, word).
    `nan` counts as a word, because NaN cannot be sorted."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    return (True, 0.0, value) if math.isnan(number) else (False, number, value)
