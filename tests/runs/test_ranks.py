"""How many ranks a run has, which jobs they share, and where launchers have put them."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from forked import start_script
from tiny_run import tiny_job

from sae_lightning import UserError
from sae_lightning.ranks import Ranks
from sae_lightning.runs.devices import count_local_ranks, count_ranks, count_threads
from sae_lightning.runs.launchers import LaunchedRank, find_first_host, find_launched_rank
from sae_lightning.runs.plan import assign_jobs
from sae_lightning.training.callbacks import stop
from sae_lightning.training.settings import Accelerator


@pytest.fixture
def config(tmp_path, monkeypatch):
    """config(**trainer settings) -> a run's config, on a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def make(device="auto", load=None, accelerator=Accelerator.auto, **trainer):
        made = tiny_job("llm", tmp_path, tmp_path).config
        made.llm = replace(made.llm, device=device, load=load or {})
        made.trainer = replace(made.trainer, accelerator=accelerator, **trainer)
        return made

    return make


def test_auto_is_all_gpus_or_one_cpu_process(config):
    assert count_ranks(config()) == 2
    assert count_ranks(config(accelerator=Accelerator.cpu)) == 1
    assert count_ranks(config(device="cpu", devices=3, accelerator=Accelerator.cpu)) == 3
    assert count_ranks(config(device="cuda:1")) == 1
    assert count_ranks(config(load={"device_map": "auto"})) == 1
    assert count_ranks(config(load={"device_map": "disk"})) == 2


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"devices": 3}, "trainer.devices=3: 3 processes would share the 2 GPUs .* at most 2"),
        ({"devices": 3, "accelerator": Accelerator.cpu}, "3 processes would share the 2 GPUs"),
        ({"nodes": 2}, r"trainer.nodes=2: .* torchrun, srun or submitit \(docs/clusters.md\)"),
        ({"devices": 2, "device": "cuda:0"}, "llm.device=cuda:0, .* each of 2 processes"),
        ({"devices": 2, "load": {"device_map": "auto"}}, "device_map: each of 2 processes"),
    ],
)
def test_settings_that_do_not_fit_the_machine(config, settings, line):
    with pytest.raises(UserError, match=line):
        count_ranks(config(**settings))


TORCHRUN = {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "MASTER_ADDR": "a", "MASTER_PORT": 7}
SRUN = {
    "SLURM_PROCID": 3,
    "SLURM_STEP_NUM_TASKS": 4,
    "SLURM_LOCALID": 1,
    "SLURM_STEP_NODELIST": "n[07-08]",
    "SLURM_JOB_ID": 123456,
    "SLURM_STEP_ID": 2,
}
SUBMITIT = {
    "SUBMITIT_LOCAL_GLOBALRANK": 3,
    "SUBMITIT_LOCAL_NTASKS": 4,
    "SUBMITIT_LOCAL_LOCALID": 1,
    "SUBMITIT_LOCAL_JOB_ID": 40012,
}


@pytest.mark.parametrize(
    ("variables", "address", "port"),
    [(TORCHRUN, "a", 7), (SRUN, "n07", 18458), (SUBMITIT, "127.0.0.1", 15012)],
)
def test_a_launcher_says_where_a_rank_is(config, monkeypatch, variables, address, port):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert find_launched_rank() == LaunchedRank(3, 4, 1, address, port)
    assert count_ranks(config(devices=2, nodes=2)) == 4
    on_cpu = {"device": "cpu", "accelerator": Accelerator.cpu}
    assert count_ranks(config(**on_cpu)) == count_threads(config(**on_cpu)) * 4 == 4
    with pytest.raises(UserError, match="trainer.devices=2, trainer.nodes=1: 4 processes were"):
        count_ranks(config(devices=2))
    monkeypatch.setenv(list(variables)[1], "1")
    assert find_launched_rank() is None


@pytest.mark.parametrize(
    ("variables", "local"),
    [
        (TORCHRUN | {"LOCAL_WORLD_SIZE": 2}, 2),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, 2),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, 3),
        (SUBMITIT, 4),
    ],
)
def test_the_ranks_of_a_machine_may_not_share_its_gpus(config, monkeypatch, variables, local):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert count_local_ranks(config(), 4) == local
    if local == 2:
        assert count_ranks(config()) == 4
    else:
        with pytest.raises(UserError, match=f"{local} processes would share the 2 GPUs"):
            count_ranks(config())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each rank is shown its own
    assert count_ranks(config()) == 4


def test_torchruns_own_store_and_its_restarts_are_used(monkeypatch):
    more = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 2}
    for name, value in (TORCHRUN | more).items():
        monkeypatch.setenv(name, str(value))
    assert find_launched_rank() == LaunchedRank(3, 4, 1, "a", 7, launcher_listens=True, restarts=2)


def test_an_allocation_without_srun_starts_no_ranks(monkeypatch):
    for name, value in SRUN.items():
        if name != "SLURM_STEP_NUM_TASKS":
            monkeypatch.setenv(name, str(value))
    assert find_launched_rank() is None


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node", "node"),
        ("a-1,b-2", "a-1"),
        ("node[03-05,9],other", "node03"),
        ("gpu[1,3].cluster", "gpu1.cluster"),
    ],
)
def test_the_first_host_of_slurms_list(hosts, first):
    assert find_first_host(hosts) == first


def test_cores_are_shared_by_the_ranks_of_a_machine(config, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert count_threads(config(devices=2)) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert count_threads(config(devices=2)) == 7
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("sizes", "split", "shares"),
    [
        ([1, 5, 3, 3], (), [[1, 0], [2, 3]]),
        ([1, 5, 3, 3], (1,), [[1, 2, 0], [1, 3]]),
        ([4, 9], (0, 1), [[0, 1], [0, 1]]),
        ([4], (), [[0], [0]]),
    ],
)
def test_jobs_are_shared_out_by_size(sizes, split, shares):
    wanted = [sorted(set(split)) + sorted(set(share) - set(split)) for share in shares]
    assert assign_jobs(sizes, frozenset(split), 2) == wanted


def test_a_rank_without_a_job_trains_a_copy_of_the_smallest():
    assert assign_jobs([4, 9], frozenset(), 4) == [[1], [0], [0], [0]]


def test_only_rank_0_is_stopped_by_signals(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stop, "world", lambda: Ranks(1, 2))
    callback = stop.StopOnSignal()
    callback.on_train_start(None, None)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    callback.on_train_end()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_ranks_that_wait_end_with_rank_0_if_it_trains_nothing(tmp_path):
    step = {"JOB_ID": os.getpid(), "STEP_ID": 0, "STEP_NUM_TASKS": 2, "STEP_NODELIST": "localhost"}
    command = ["train.py", "data=synthetic", "model=topk", "model.k=100000"]
    started = []
    for rank in range(2):
        own = {f"SLURM_{k}": str(v) for k, v in (step | {"PROCID": rank, "LOCALID": rank}).items()}
        started.append(start_script(*command, cwd=tmp_path, **own))
    first, second = (process.wait() for process in started)
    assert first.stderr.startswith("error: model.k=100000") and first.stderr.count("\n") == 1
    assert second.stderr == ""
    assert (first.returncode, second.returncode) == (1, 0)
    assert not [*tmp_path.iterdir()]
