"""What TensorBoard's HParams tab is told of the runs of a command."""

from collections.abc import Collection, Sequence

from sae_lightning.report.sweep_table import find_swept, split_overrides
from sae_lightning.runs.jobs import Job
from sae_lightning.training.logging import HEADLINE, HParams

# A column for every setting would bury these.
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
    """Of each job: first what was swept, or what was typed for a run alone."""
    typed = [split_overrides(job.overrides) for job in jobs]
    # a resumed job is as it was typed once: what its sweep varied shows in what differs
    varied = find_swept(typed)
    swept = [
        [name for name in job.swept if name in mine] or varied or [*mine]
        for job, mine in zip(jobs, typed, strict=True)
    ]
    settings = [_select_settings(*each) for each in zip(jobs, typed, swept, strict=True)]
    columns: dict = {}
    for mine in settings:
        columns = mine | columns
    return [
        HParams(mine, columns, first, _list_headline_metrics(job))
        for job, mine, first in zip(jobs, settings, swept, strict=True)
    ]


def _select_settings(job: Job, typed: dict[str, str], swept: Collection[str]) -> dict:
    """By name; a preset that was swept, `model=relu`, is among them as it was typed."""
    return {name: typed[name] for name in swept if name in typed} | {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in job.config.to_flat_dict().items()
        if name.startswith(HPARAM_SETTINGS) or name in swept
    }


def _list_headline_metrics(job: Job) -> list[str]:
    source = job.config.data_source
    measured, _ = source.measured(job.config.eval.loss_tokens)
    return [*HEADLINE, *(f"held_out/{name}" for name in {source.headline} & measured)]
