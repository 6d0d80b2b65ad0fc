"""Hydra's sweep syntax, the search with Optuna, and jobs in processes of other launchers."""

import json
import math
import re
from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import pytest
from board import list_hparams, open_board
from forked import run_script
from hydra._internal.callbacks import Callbacks
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from tiny_run import write_text

from sae_lightning.runs import jobs
from sae_lightning.runs.config import Config, to_dataclass
from sae_lightning.runs.search import SweepConfig, compute_objective
from sae_lightning.runs.sweep import Sweep

ROOT = Path(__file__).parents[2]
# Optuna 2 is written for SQLAlchemy 1, which says of itself that it is old
pytestmark = [
    pytest.mark.filterwarnings("ignore:Deprecated API features:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated"),
]


class Recorder:
    """A launcher that trains nothing: what a run returns is a function of its overrides."""

    def __init__(self, trained):
        self.trained = trained
        self.batches: list[list[dict[str, str]]] = []

    def launch(self, job_overrides, initial_job_idx: int) -> list[JobReturn]:
        """Note the batch, setting by setting."""
        self.batches.append([dict(o.split("=") for o in overrides) for overrides in job_overrides])
        return [
            JobReturn(status=JobStatus.COMPLETED, _return_value=self.trained(overrides))
            for overrides in self.batches[-1]
        ]


@pytest.fixture
def sweep(hydra, tmp_path):
    """sweep(typed, trained) -> the batches of overrides that `train.py -m typed` would train."""

    def batches(arguments: list[str], trained=lambda overrides: 0.0) -> list[list[dict]]:
        config = configured(hydra, [*arguments, f"hydra.sweep.dir={tmp_path}"])
        sweeper = Plugins.instance().instantiate_sweeper(
            config=config,
            hydra_context=HydraContext(config_loader=hydra, callbacks=Callbacks()),
            task_function=lambda cfg: None,
        )
        recorder = Recorder(trained)
        getattr(sweeper, "sweeper", sweeper).launcher = recorder  # Optuna's is a shell
        sweeper.sweep(OmegaConf.to_container(config.hydra.overrides.task, resolve=False))
        return recorder.batches

    return batches


def configured(hydra, arguments: list[str]) -> DictConfig:
    """The config of the multirun that was typed."""
    return hydra.load_configuration(
        "config", [*arguments, "hydra/launcher=basic"], RunMode.MULTIRUN
    )


def composed(hydra, overrides: dict[str, str]) -> Config:
    """The typed config of one job."""
    given = [f"{name}={value}" for name, value in overrides.items()]
    config = hydra.load_sweep_config(configured(hydra, []), given)
    with read_write(config), open_dict(config):
        del config["hydra"]
    return to_dataclass(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "setting", "values"),
    [
        (["loss.l1=1e-4,1e-3"], "loss.l1", [1e-4, 1e-3]),
        (["loss.l1=choice(1e-4,1e-2)"], "loss.l1", [1e-4, 1e-2]),
        (["layer.index=range(3,10,6)"], "layer.index", [3, 9]),
        (["model.features=sort(choice(64,16),reverse=true)"], "model.features", [64, 16]),
        (["model=glob(*topk)"], "model.name", ["batch_topk", "topk"]),
        (["layer=glob(*,exclude=resid)"], "layer.source", ["attn", "mlp", "mlp_in"]),
        (["seed=0,1", "model.seed=2,3"], "model.seed", [2, 3, 2, 3]),
        (["loss.l1=1e-3,1e-2", "optim.clip=null"], "optim.clip", [None, None]),
    ],
)
def test_hydras_syntax_of_a_grid_gives_one_config_a_value(sweep, hydra, arguments, setting, values):
    (batch,) = sweep(arguments)
    assert [composed(hydra, job).to_flat_dict()[setting] for job in batch] == values


@pytest.mark.slow
def test_a_preset_can_hold_a_sweep(sweep, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nhydra: {sweeper: {params: {loss.l1: '1e-3,1e-2', seed: 0}}}"
    )
    (batch,) = sweep([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine", "seed=3"])
    assert [(job["loss.l1"], job["seed"]) for job in batch] == [("0.001", "3"), ("0.01", "3")]


SEARCH = ["hydra/sweeper=optuna", "loss.l1=tag(log,interval(1e-5,1e-1))"]


def test_a_search_maximises_and_chooses_five_trials_at_a_time(sweep, tmp_path):
    """The value is minus the distance of l1 from 1e-3 in powers of ten: at most 2."""

    def distance(job: dict[str, str]) -> float:
        return abs(math.log10(float(job["loss.l1"])) + 3)

    batches = sweep([*SEARCH, "hydra.sweeper.n_trials=42"], lambda job: -distance(job))
    assert [len(batch) for batch in batches] == [5] * 8 + [2]
    tried = [distance(job) for batch in batches for job in batch]
    found = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert found.best_value == pytest.approx(-min(tried))
    # drawn blindly it is 1 on average
    assert sum(tried[-20:]) / 20 < 0.6


def test_a_search_ends_where_l0_is_what_was_asked_for(sweep, tmp_path):
    """L0 = 0.1 / l1 and CE recovered = 1 - 1 / L0: without a bound the best would be L0 10,000."""

    def trained(job: dict[str, str]) -> float:
        l0 = 0.1 / float(job["loss.l1"])
        metrics = {"l0": l0, "ce_recovered": 1 - 1 / l0, "ce_zero": 2.0, "ce_clean": 1.0}
        return compute_objective(metrics, SweepConfig(l0=64.0))

    sweep([*SEARCH, "sweep.l0=64", "hydra.sweeper.n_trials=40"], trained)
    best = OmegaConf.load(tmp_path / "optimization_results.yaml").best_params["loss.l1"]
    assert 32 < 0.1 / best < 64 * 1.01


@pytest.mark.slow
def test_a_search_is_repeated_with_the_same_trials(sweep):
    few = [*SEARCH, "hydra.sweeper.n_trials=3"]
    assert sweep(few) == sweep(few)


def test_a_search_survives_failed_runs_and_metrics_that_are_nan(sweep, tmp_path):
    """A failed run returns None; nan itself would end the search with a traceback of Optuna's."""
    returned = iter(
        [None, compute_objective({"kl": math.nan}, SweepConfig(objective="-kl")), 0.5, None]
    )
    few = [*SEARCH, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2"]
    batches = sweep(few, lambda job: next(returned))
    found = OmegaConf.load(tmp_path / "optimization_results.yaml")
    best = float(batches[1][0]["loss.l1"])
    assert (found.best_value, found.best_params) == (0.5, {"loss.l1": best})


@pytest.mark.slow
def test_a_search_over_presets_and_sizes_composes(sweep, hydra):
    swept = [
        "model=choice(relu,dense)",
        "model.features=choice(16,64)",
        "layer.index=range(3,15,6)",
    ]
    (batch,) = sweep([*SEARCH[:1], *swept, "seed=3", "hydra.sweeper.n_trials=5"])
    configs = [composed(hydra, job) for job in batch]
    assert {config.model.name for config in configs} == {"relu", "dense"}
    assert {config.model.features for config in configs} == {16, 64}
    assert {config.layer.index for config in configs} <= {3, 9, 15}
    assert {config.seed for config in configs} == {3}


@pytest.fixture
def train(tmp_path, tiny_folder):
    """train(*overrides) -> the finished `train.py -m` of a tiny LLM, begun in tmp_path."""
    (tmp_path / "text").mkdir()
    write_text(tmp_path / "text")
    tiny = ["llm=hf", f"llm.name={tiny_folder('llama')}", "llm.dtype=float32", "layer.index=1"]
    tiny += ["data=text", "data.path=text", "data.held_out=0.34", "data.context=16"]
    tiny += ["data.pool=256", "trainer=cpu", "trainer.tokens=1280", "trainer.batch=64"]
    tiny += ["model.features=48", "eval.tokens=150", "optim.clip=null", "hydra.sweep.dir=sweep"]

    def done(*overrides: str):
        cache = str(tmp_path / "cache")
        return run_script(
            "train.py", "-m", *tiny, *overrides, cwd=tmp_path, HF_DATASETS_CACHE=cache
        )

    return done


def held_out(run: Path) -> dict[str, float]:
    """The final metrics in a run folder."""
    return json.loads((run / "metrics.json").read_text())["held_out"]


@pytest.mark.slow
def test_submitit_trains_every_job_in_a_process_of_its_own(train, tmp_path):
    done = train("hydra/launcher=submitit_local", "loss.l1=0.001,0.01")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    for l1 in ("0.001", "0.01"):
        run = tmp_path / "sweep" / f"loss.l1={l1}"
        assert (run / "sae" / "sae_weights.safetensors").is_file()
        assert held_out(run)["l0"] > 0
    assert len(list((tmp_path / "sweep" / ".submitit").glob("*/*_log.out"))) == 2


@pytest.mark.slow
def test_a_job_on_a_cluster_says_at_home_why_it_failed_and_is_taken_up_again(train, tmp_path):
    jobs = ["hydra/launcher=submitit_local", "optim.lr=1e30,1e-3"]
    done = train(*jobs)
    assert done.returncode == 1
    assert done.stderr == "error: 1 of the 2 jobs failed, see above\n"
    assert re.search(r"failed: optim\.lr=1e\+30: .*is not finite", done.stdout), done.stdout
    assert "is not finite" in (tmp_path / "sweep" / "sweep.csv").read_text()
    # as a cluster does with a job whose machine it took away
    metrics = tmp_path / "sweep" / "optim.lr=0.001" / "metrics.json"
    metrics.unlink()
    assert train(*jobs).returncode == 1
    assert metrics.is_file(), "from the checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "one_pass"])
def test_optuna_is_told_what_the_runs_achieved(train, tmp_path, launcher):
    search = ["loss.l1=tag(log,interval(1e-4,1e-1))", "sweep.l0=8", "hydra.sweeper.n_trials=3"]
    storage = ["hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=tiny"]
    done = train("hydra/sweeper=optuna", f"hydra/launcher={launcher}", *search, *storage)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    sweep = SweepConfig(l0=8.0)
    values = {
        run: compute_objective(held_out(run), sweep) for run in (tmp_path / "sweep").glob("loss*")
    }
    assert len(values) == 3
    best = max(values, key=values.get)
    found = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert found.best_value == pytest.approx(values[best])
    assert best.name == f"loss.l1={found.best_params['loss.l1']}"
    assert f"Best value: {found.best_value}" in done.stdout.splitlines()
    assert (tmp_path / "study.db").is_file()
    shown = list_hparams(open_board(tmp_path / "sweep"))
    assert [name for name in shown if name.endswith("*")] == ["loss.l1*"], "in TensorBoard"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "start", "place", "top"),
    [
        (RunMode.RUN, Sweep.on_run_start, "hydra.run.dir", "outputs"),
        (RunMode.MULTIRUN, Sweep.on_multirun_start, "hydra.sweep.dir", "multirun"),
    ],
)
def test_what_starts_in_the_same_second_gets_a_folder_of_its_own(
    hydra, tmp_path, monkeypatch, mode, start, place, top
):
    monkeypatch.chdir(tmp_path)
    day = datetime(2026, 1, 31, 12)
    monkeypatch.setattr(jobs, "datetime", Mock(now=lambda: day))
    OmegaConf.register_new_resolver("now", day.strftime, use_cache=True, replace=True)
    folders = []
    for _ in range(3):
        config = hydra.load_configuration("config", [], mode)
        start(Sweep(), config)
        folders.append(OmegaConf.select(config, place))
        a_job = hydra.load_sweep_config(config, [])
        assert OmegaConf.select(a_job, place) == folders[-1], "all jobs of a sweep share one"
    whole = f"{top}/2026-01-31/12-00-00"
    assert folders == [whole, f"{whole}-2", f"{whole}-3"]
    chosen = hydra.load_configuration("config", [f"{place}={whole}"], mode)
    start(Sweep(), chosen)
    assert OmegaConf.select(chosen, place) == whole, "a folder that was named is that folder"


@pytest.mark.parametrize("name", ["multirun.yaml", "optimization_results.yaml", "loss.l1=1"])
def test_a_sweeps_folder_with_a_link_in_it_is_refused(tmp_path, name):
    """Hydra and its sweepers would write through it."""
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    config = OmegaConf.create(
        {"hydra": {"sweep": {"dir": str(tmp_path)}, "overrides": {"task": []}}}
    )
    with pytest.raises(
        SystemExit, match=f"{name} is a symbolic link, through which files elsewhere"
    ):
        Sweep().on_multirun_start(config)
    assert not (tmp_path / "elsewhere").exists()
