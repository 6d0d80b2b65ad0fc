"""What is typed is answered before Hydra reads it, and what is swept before anything is made."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from hydra._internal.callbacks import Callbacks
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf

from sae_lightning.errors import PACKAGES, UserError
from sae_lightning.runs.arguments import check_arguments
from sae_lightning.runs.cli import explain_error
from sae_lightning.runs.sweep import Sweep

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        ("loss.l1=1,2 -m seed=3", "-m loss.l1=1,2 seed=3"),
        ("loss.l1=1,2 seed=3 --multirun", "--multirun loss.l1=1,2 seed=3"),
        ("seed=3 --cfg job -cn analyze ~loss", "--cfg job -cn analyze seed=3 ~loss"),
        ("-m seed=1", "-m seed=1"),
    ],
)
def test_a_flag_may_stand_anywhere(typed, taken):
    assert check_arguments(typed.split()) == taken.split()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        *(
            (f"{name}={value}", f"{name}={value}: empty")
            for name in (
                "resume",
                "run",
                "hydra.run.dir",
                "hydra.sweep.dir",
                "hydra.sweep.subdir",
                "data.cache_folder",
                "data.path",
                "llm.name",
            )
            for value in ("", "''")
        ),
        ("hydra.sweeper.params.seed=3", "hydra.sweeper.params.seed=3: hydra.sweeper.params is for"),
        ("+hydra.sweeper.params={seed:3}", "+hydra.sweeper.params={seed:3}: hydra.sweeper.params"),
        ("seed=1 model.k=3 seed=2", "seed=1 seed=2: seed is given twice; leave one out"),
        ("-m model=relu +model=topk", "model=relu +model=topk: model is given twice; leave one"),
        ("-m model=relu,topk --cfg job", "-m: --cfg and --info describe one SAE; leave -m out"),
        ("seed=1,2 --multirun --info", "-m: --cfg and --info describe one SAE; leave -m out"),
        ("prompt=???", "prompt=???: ??? stands for a value that is not given; give one"),
        ("run='???'", "run='???': ??? stands for a value that is not given; give one"),
        ("seed=1 seed=1", "seed=1 seed=1: seed is given twice; leave one out"),
        ("plugins=[a] plugins=[b]", "plugins=[a] plugins=[b]: plugins is given twice; leave one"),
        ("hydra.sweeper.search_space.seed.low=1", "hydra.sweeper.search_space.seed.low=1: hydra."),
    ],
)
def test_what_cannot_be_meant_is_refused(typed, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        check_arguments(typed.split(" "))


@pytest.mark.parametrize("name", ["plotly", "jinja2", "gguf", "tensorboard", "pyarrow"])
def test_a_package_that_is_missing_is_told_before_any_is_imported(name):
    code = f"""
import runpy, sys
sys.modules[{name!r}] = None
try:
    runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    told = f"error: the package {name} is not installed: pip install -c constraints.txt -e .\n"
    assert (done.returncode, done.stderr) == (1, told)


SEARCH = "hydra/sweeper=optuna"
SWEPT = {
    # lists that are empty: nothing would be trained, with exit code 0
    "model=glob(zz*)": r"model=glob\(zz\*\): this is empty, so nothing would be trained",
    "layer.index=glob(*)": r"layer\.index=glob\(\*\): this is empty, .*",
    "layer.index=range(3,1)": r"layer\.index=range\(3,1\): this is empty, .*",
    "layer.index=range(1,3,0)": r"layer\.index=range\(1,3,0\): give finite .* a step that is not 0",
    "loss.l1=range(0,inf)": r"loss\.l1=range\(0,inf\): give finite numbers, and a step .*",
    "loss.l1=range(0,1e300,1e-300)": r"loss\.l1=range\(0,1e300,1e-300\): give finite numbers, .*",
    "loss.l1=range(0,1,1e-300)": r"loss\.l1=range\(0,1,1e-300\): more than 100,000 jobs; give .*",
    "seed=range(0,1000) layer.index=range(0,1000) loss.l1=1": r"seed=range\(0,1000\) "
    r"layer\.index=range\(0,1000\): more than 100,000 jobs; give fewer values, or let a search .*",
    "loss.l1=interval(1,2)": r"loss\.l1=interval\(1,2\): only a search takes an interval: .*",
    "seed=1,2 hydra.sweeper.max_batch_size=0": r"hydra\.sweeper\.max_batch_size=0: give 1 or .*",
    "seed=1,2 hydra.sweeper.max_batch_size=-1": r"hydra\.sweeper\.max_batch_size=-1: give 1 or .*",
    "seed=1,2 loss.l1=1 seed=3": r"seed=1,2: seed is given twice; leave one out",
    "seed=3 seed=1,2": r"seed=1,2: seed is given twice; leave one out",
    # searches
    f"{SEARCH} loss.l1=interval(5,1)": r"loss\.l1=interval\(5,1\): give two finite numbers, the .*",
    f"{SEARCH} loss.l1=interval(nan,1)": r"loss\.l1=interval\(nan,1\): give two finite numbers, .*",
    f"{SEARCH} loss.l1=interval(1,inf)": r"loss\.l1=interval\(1,inf\): give two finite numbers, .*",
    f"{SEARCH} layer.index=range(5,1)": r"layer\.index=range\(5,1\): give two finite numbers, .*",
    f"{SEARCH} loss.l1=tag(log,interval(0,1))": r"loss\.l1=.*: give two .* above 0, .*",
    f"{SEARCH} model=glob(*)": r"model=glob\(\*\): a search takes no glob; write choice\(\.\.\.\)",
    f"{SEARCH} seed=1,2 hydra.sweeper.n_trials=0": r"hydra\.sweeper\.n_trials=0: give 1 .*",
    f"{SEARCH} seed=1,2 hydra.sweeper.n_jobs=0": r"hydra\.sweeper\.n_jobs=0: give 1 or more, .*",
}


@pytest.mark.slow
@pytest.mark.parametrize("typed", SWEPT)
def test_a_sweep_over_nothing_possible_is_refused_before_anything_is_made(hydra, tmp_path, typed):
    folder = tmp_path / "sweep"
    given = [*typed.split(), f"hydra.sweep.dir={folder}"]
    config = hydra.load_configuration("config", given, RunMode.MULTIRUN)
    with pytest.raises(SystemExit) as ended:
        Sweep().on_multirun_start(config)
    assert re.fullmatch(f"error: {SWEPT[typed]}", ended.value.code), ended.value.code
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Deprecated API features:DeprecationWarning")
@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("hydra.sweeper.storage=foo", "Could not parse"),
        ("hydra.sweeper.storage=sqlite:////no/such/x.db", "unable to open"),
        ("hydra.sweeper.storage=postgresql://a/b", ""),
        ("hydra.sweeper.direction=up", "Please set either"),
        ("hydra/sweeper/sampler=grid", "GridSampler only supports discrete"),
    ],
)
def test_what_optuna_refuses_is_told_in_one_line(hydra, tmp_path, setting, told):
    given = [SEARCH, "loss.l1=interval(1,2)", setting, f"hydra.sweep.dir={tmp_path}"]
    config = hydra.load_configuration("config", given, RunMode.MULTIRUN)
    sweeper = Plugins.instance().instantiate_sweeper(
        config=config,
        hydra_context=HydraContext(config_loader=hydra, callbacks=Callbacks()),
        task_function=lambda cfg: None,
    )
    with pytest.raises(Exception) as error:  # noqa: B017, PT011 - of several libraries
        sweeper.sweep(OmegaConf.to_container(config.hydra.overrides.task, resolve=False))
    line = explain_error(error.value, [])
    assert re.fullmatch(f"hydra/sweeper=optuna: .*{told}.*; see its settings, such as .*", line)


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to another process")
@pytest.mark.parametrize("script", ["train.py", "analyze.py"])
def test_ctrl_c_while_libraries_are_imported_shows_no_traceback(script):
    process = subprocess.Popen(
        [sys.executable, "-v", str(ROOT / script)], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if line.startswith("import 'hydra"):
            process.send_signal(signal.SIGINT)
            break
    assert "Traceback" not in process.communicate()[1]
    assert process.returncode == -signal.SIGINT


def test_every_package_that_is_needed_is_looked_for_at_the_start():
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text("utf8"))
    needed = {re.split(r"[><=\[ ]", line)[0] for line in project["project"]["dependencies"]}
    names = packages_distributions()
    assert needed == {names[package][0].lower().replace("_", "-") for package in PACKAGES}
