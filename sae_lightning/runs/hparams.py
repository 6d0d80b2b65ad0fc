"""Settings and metrics of the runs for TensorBoard's HParams tab."""

from collections.abc import Collection, Sequence

from sae_lightning.report.sweep_table import find_swept, split_overrides
from sae_lightning.runs.jobs import Job
from sae_lightning.training.logging import HEADLINE, HParams

# Prefixes of the settings that get a column; with all settings the tab would be unreadable.
HPARAM_SETTINGS = (
    "model.",
    "loss.",
    "layer.",
    "optim.lr",
    "llm.name",
    "trainer.tokens",
    "trainer.batch",
)


def make_hparams(jobs: Sequence[Job]) -> list[HParams]:
    """The content of the tab for each job. The first columns are the swept settings or, for a
    plain run, the typed ones."""
    overrides = [split_overrides(job.overrides) for job in jobs]
    # `job.swept` is empty in resumed jobs and lacks added seeds and controls: compare the jobs, too
    varying_names = find_swept(overrides)
    swept = []
    for job, typed in zip(jobs, overrides, strict=True):
        names = [name for name in job.swept if name in typed]
        names = [*dict.fromkeys(names + varying_names)]  # each name once
        if not names:  # a job of a sweep is resumed alone: the folder's name has the swept settings
            in_folder_name = [part.partition("=")[0] for part in job.folder.name.split(",")]
            names = [name for name in typed if name in in_folder_name]
        swept.append(names or [*typed])
    settings = list(map(_select_settings, jobs, overrides, swept))
    columns: dict = {}
    for values in settings:
        columns = values | columns  # presets of a later job come first
    return [
        HParams(values, columns, names, _list_headline_metrics(job))
        for job, values, names in zip(jobs, settings, swept, strict=True)
    ]


def _select_settings(job: Job, overrides: dict[str, str], swept: Collection[str]) -> dict:
    """The job's columns: setting -> value, including swept presets such as `model=relu`."""
    presets = {name: overrides[name] for name in swept if name in overrides}
    return presets | {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in job.config.to_flat_dict().items()
        # without a warm start, the column would only say None
        if name in swept
        or (name.startswith(HPARAM_SETTINGS) and (name, value) != ("model.start", None))
    }


def _list_headline_metrics(job: Job) -> list[str]:
    """The metrics that the tab shows: those of every run, and the main one of the kind of data."""
    source = job.config.data_source
    metrics, _ = source.list_metrics(job.config.eval.loss_tokens)
    return [*HEADLINE, f"held_out/{source.headline}"] if source.headline in metrics else [*HEADLINE]
