"""TensorBoard's HParams tab, by its own HTTP answer: it opens with what was swept."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from board import list_hparams, open_board, read_runs
from hydra import compose

from sae_lightning.runs.hparams import make_hparams
from sae_lightning.runs.jobs import Job, make_job, read_swept_settings
from sae_lightning.training.logging import HeadLog

pytestmark = [
    pytest.mark.usefixtures("hydra"),
    pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated"),
]


def grid(line: str, folder: Path) -> list[Job]:
    """The jobs of `train.py -m line`, not knowing what was swept, as those of a resumed sweep."""
    choices = [
        [f"{o.partition('=')[0]}={v}" for v in o.partition("=")[2].split(",")] for o in line.split()
    ]
    made = [[*each] for each in product(*choices)]
    return [make_job(compose("config", each), folder / ",".join(each), each) for each in made]


def logged(jobs: list[Job]):
    """TensorBoard on the runs of these jobs."""
    for each, told in zip(jobs, make_hparams(jobs), strict=True):
        each.folder.mkdir(parents=True)
        HeadLog(each.folder, told, None).close()
    return open_board(jobs[0].folder.parent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "first"),
    [
        # presets, of which all else in the model and its loss follows
        ("model=relu,jumprelu loss.target_l0=8,16 seed=3", ["loss.target_l0*", "model*"]),
        # what is the same for all does not count, and each seed is a pass of its own
        ("seed=0,1 model=topk model.k=4", ["seed*"]),
        # one run: what was typed
        ("trainer=smoke loss.l1=1e-3", ["loss.l1*", "trainer*"]),
    ],
)
def test_the_tab_opens_with_what_was_typed_with_several_values(tmp_path, line, first):
    jobs = grid(line, tmp_path)
    board = logged(jobs)
    shown = list_hparams(board)
    assert [name for name in shown if name.endswith("*")] == shown[: len(first)] == first
    found = read_runs(board)
    assert len(found) == len(jobs)
    known = set().union(*found.values())
    assert known == {name.rstrip("*") for name in shown}, "every run's settings have a column"
    if "jumprelu" in line:
        pairs = [(run["model"], run["model.name"], run["loss.target_l0"]) for run in found.values()]
        assert sorted(pairs) == [(m, m, l0) for m in ("jumprelu", "relu") for l0 in (8, 16)]


def test_one_trial_of_a_search_knows_what_is_searched(tmp_path):
    """A batch of one job tells nothing by itself; its multirun does."""
    typed = ["loss.l1=0.003", "model.features=64", "seed=3"]
    same = "hydra.job.config.override_dirname.exclude_keys=['model.features','seed']"
    (one,) = grid(" ".join(typed), tmp_path)
    hydra = compose("config", [*typed, same], return_hydra_config=True).hydra
    assert read_swept_settings(hydra) == ["loss.l1"]
    shown = list_hparams(logged([replace(one, swept=read_swept_settings(hydra))]))
    assert [name for name in shown if name.endswith("*")] == ["loss.l1*"]


def test_a_job_of_a_sweep_that_is_resumed_alone_knows_what_was_swept(tmp_path):
    (one,) = grid("loss.l1=0.003 model.features=64 seed=3", tmp_path)
    one = replace(one, folder=tmp_path / "loss.l1=0.003,seed=3", swept=["resume"], resumed=True)
    (told,) = make_hparams([one])
    assert told.swept == ["loss.l1", "seed"]
