"""The runs of a sweep averaged over seeds: one row for the runs that differ in seeds only."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_lightning.report.experiments import identify_experiment
from sae_lightning.report.figures import find_pareto_front
from sae_lightning.report.noise import Estimates, differ_significantly
from sae_lightning.report.sweep_table import METRIC_COLUMNS, SweepRun, SweepTable, make_natural_key

if TYPE_CHECKING:
    import pandas as pd

SEED_SETTINGS = ("seed", "data.seed", "model.seed")
CONTROL_SETTING = "model.control"
TRAINED = "trained"


def read_kind(run: SweepRun) -> str:
    """Read the kind of a run: TRAINED, or the name of a control."""
    return str(run.settings.get(CONTROL_SETTING) or TRAINED)


def read_seeds(run: SweepRun) -> tuple:
    """Read the run's values of SEED_SETTINGS; None for a setting that it does not have."""
    return tuple(run.settings.get(name) for name in SEED_SETTINGS)


class MeansTable:
    """A row is a run, or the mean of runs that differ in seeds only; an experiment's trained SAE
    comes before its controls. Every frame, array and list but `keys` has one entry per row."""

    def __init__(self, table: SweepTable):
        import pandas as pd  # imported late, like in SweepTable

        groups = _group_repetitions(table)
        self.is_repeated = any(len(group) > 1 for group in groups.values())
        """Whether any row stands for several runs."""
        self.has_controls = any(kind != TRAINED for _, kind, *_ in groups)
        hidden = [*SEED_SETTINGS] if self.is_repeated else []
        hidden += [CONTROL_SETTING] if self.has_controls else []
        self.keys = [key for key in table.keys if key not in hidden]
        """Names of the settings in which rows differ, apart from the kind."""
        if self.has_controls:
            groups = dict(sorted(groups.items(), key=lambda item: _make_sort_key(item[0])))
        self.table, self.columns = table, table.columns
        self.members = [*groups.values()]
        """Indices of each row's runs in `table.runs`."""
        self.kinds = [kind for _, kind, *_ in groups]
        """Kind of each row's runs, from `read_kind`."""
        self.experiments = [experiment for _, _, experiment, _ in groups]
        """Experiment of each row's runs, from `identify_experiment`."""
        finished = [[i for i in group if table.is_finished[i]] for group in self.members]
        self.num_finished = np.array([len(indices) for indices in finished])
        """Number of finished runs of each row."""
        comparable = table.comparable_metrics.to_numpy()
        measured = table.frame[table.metrics].to_numpy(float)
        means = [_average(comparable[i]) for i in finished]
        self.mean = pd.DataFrame(means, columns=[*METRIC_COLUMNS])
        spreads = [_measure_spread(comparable[i]) for i in finished]
        self.spread = pd.DataFrame(spreads, columns=[*METRIC_COLUMNS])
        """Mean and sample standard deviation of metrics as in `SweepTable.comparable_metrics`."""
        self.spread["stable"] *= _correct_for_pairs(self.num_finished)
        spreads = [_measure_spread(measured[i]) for i in finished]
        self.shown_spread = pd.DataFrame(spreads, columns=table.metrics)
        """Sample standard deviation over seeds of all metrics as measured; NaN for one run."""
        self.frame = table.frame.iloc[[group[0] for group in self.members]].reset_index(drop=True)
        """Like `SweepTable.frame`: the values of a single run or the means of several (of `tokens`,
        the maximum)."""
        for row, group in enumerate(self.members):
            if len(group) > 1:
                self.frame.loc[row, table.metrics] = _average(measured[finished[row]])
                self._combine_runs(row, table.frame.loc[group])
        self.best = pd.DataFrame({name: self._find_best(name) for name in METRIC_COLUMNS})
        """Frame of [rows] bool for each metric, from `_find_best`."""
        self.front = self.find_front("explained_variance")
        """[rows] bool: on the Pareto front of L0 and EV, of the trained SAEs or of the controls."""

    def _combine_runs(self, row: int, runs: "pd.DataFrame") -> None:
        """Set the columns of `row` that are no metrics from those of its `runs`."""
        self.frame.at[row, "tokens"] = max(runs.tokens.dropna(), default=None)
        self.frame.at[row, "status"] = _count_statuses(runs.status)
        self.frame.at[row, "reason"] = "; ".join(dict.fromkeys(runs.reason.dropna())) or None

    def estimate(self, name: str) -> Estimates:
        """Mean, spread and number of seeds of a metric, for all rows."""
        mean, spread = self.mean[name].to_numpy(), self.spread[name].to_numpy()
        return Estimates(mean, spread, self.num_finished)

    def _find_best(self, name: str) -> np.ndarray:
        """Mark the best row, and the rows that do not differ from it by more than the noise, bool
        [rows]; no row if neither direction is better, or all values are NaN."""
        values, better = self.estimate(name), METRIC_COLUMNS[name].better
        if not better or np.isnan(values.mean).all():
            return np.zeros(len(self.members), bool)
        best = values.pick([np.nanargmax(values.mean * better)])
        return ~differ_significantly(values, best) & ~np.isnan(values.mean)

    def find_front(self, quality: str) -> np.ndarray:
        """Mark the rows on the Pareto front of L0 and a metric: trained SAEs among themselves, and
        controls among themselves."""
        front = np.zeros(len(self.members), bool)
        trained = np.array([kind == TRAINED for kind in self.kinds])
        for rows in (trained, ~trained):
            l0, values = self.estimate("l0").pick(rows), self.estimate(quality).pick(rows)
            front[rows] = find_pareto_front(l0, values)
        return front

    def mark(self, row: int, name: str) -> str:
        """Choose the mark of a cell: `*` if it is the best of its column. With seeds, cells that
        do not differ significantly from the best have `≈`, unless all cells of the column do."""
        count = self.best[name].sum()
        if not self.best.at[row, name]:
            return ""
        if self.is_repeated and count > 1:
            return "≈" if count < self.mean[name].count() else ""  # a mark on all says nothing
        return "*"

    def format_cell(self, row: int, name: str) -> str:
        """Format a cell: the value of a single run, or mean ± spread."""
        value = self.frame.at[row, name]
        if len(self.members[row]) > 1 and np.isnan(value):
            value = None  # a dash: some finished run lacks it, or none has finished
        return self._format(name, value, self.shown_spread.at[row, name])

    def format_compared(self, row: int, name: str) -> str:
        """Like `format_cell`, with the values that are compared: CE recovered at most 1."""
        values = self.table.comparable_metrics.loc[self.members[row], name]
        return self._format(name, values.mean(), values.std())

    def _format(self, name: str, value: float | None, spread: float) -> str:
        """Format a value (a dash for None) and its spread, unless that is NaN."""
        format_value = self.columns[name].format_value
        return format_value(value) + ("" if np.isnan(spread) else f" ± {format_value(spread)}")

    def name_row(self, row: int) -> str:
        """The row's swept settings, such as `loss.l1=0.001`; without any, its architecture."""
        pairs = [f"{key}={self.frame.at[row, key]}" for key in self.keys]
        settings = self.table.runs[self.members[row][0]].settings
        return ", ".join(pairs) or str(settings.get("model.name", self.frame.at[row, "folder"]))

    def make_csv_frame(self) -> Any:
        """Make a frame of each row's settings, kind, number of finished runs, and mean and spread
        of each metric; the spread's column is called `<metric>.spread`."""
        frame = self.frame[self.keys].assign(kind=self.kinds, seeds=self.num_finished)
        for name in self.table.metrics:
            frame[name], frame[f"{name}.spread"] = self.frame[name], self.shown_spread[name]
        return frame.assign(tokens=self.frame.tokens, status=self.frame.status)


def _group_repetitions(table: SweepTable) -> dict[tuple, list[int]]:
    """Group the runs that differ in seeds only: (swept values, kind, experiment, trial) -> indices
    in `table.runs`."""
    groups: dict[tuple, list[int]] = {}
    trials = Counter()
    keys = [key for key in table.keys if key not in (*SEED_SETTINGS, CONTROL_SETTING)]
    for i, run in enumerate(table.runs):
        # a run whose settings cannot be read is alone in its experiment
        experiment = identify_experiment(run.settings) if run.settings else str(run.folder)
        compared = tuple(table.frame.loc[i, keys]), read_kind(run), experiment
        # a search may try the same settings and seeds again: each trial has a row
        trial = trials[compared, read_seeds(run)]
        trials[compared, read_seeds(run)] += 1
        groups.setdefault((*compared, trial), []).append(i)
    return groups


def _make_sort_key(key: tuple) -> tuple:
    """Sort key of (swept values, kind, experiment, trial) that puts controls last."""
    swept, kind, *_ = key
    return [make_natural_key(value) for value in swept], kind != TRAINED, kind


def _average(values: np.ndarray) -> np.ndarray:
    """Mean of the rows [n, metrics]; NaN where there are none."""
    return values.mean(axis=0) if len(values) else np.full(values.shape[1], np.nan)


def _correct_for_pairs(seeds: np.ndarray) -> np.ndarray:
    """Factors that correct the spread of the share of stable features over n seeds; n from `seeds`.

    A run's share is a mean over its pairs with all other runs. Two runs have one pair in common, so
    their shares differ by less than those of independent seeds. The jackknife of a mean over pairs
    gives the factor 2 * (n - 1) / (n - 2). NaN for up to two seeds.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(seeds > 2, 2 * (seeds - 1) / (seeds - 2), np.nan)


def _measure_spread(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation of the rows [n, metrics]; NaN for fewer than two."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)


def _count_statuses(statuses: Any) -> str:
    """The status that all runs have, such as `finished`, or counts: `2 finished, 1 failed`."""
    counts = statuses.value_counts()
    text = ", ".join(f"{n} {status}" for status, n in counts.items())
    return text if len(counts) > 1 else counts.index[0]
