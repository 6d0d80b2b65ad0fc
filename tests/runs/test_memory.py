"""What an update takes, measured, against what the estimate charges for it; and what is free."""

import os
import resource
from itertools import accumulate

import numpy as np
import psutil
import pyarrow
import pytest
import torch
from torch import Generator
from torch.profiler import ProfilerActivity, profile

from sae_lightning.errors import is_out_of_memory
from sae_lightning.runs import memory
from sae_lightning.runs.memory import EVALUATION_SHARE
from sae_lightning.sae import ARCHITECTURES, TrainingStatus, build_sae
from sae_lightning.sae.jumprelu import PenaltyKind

TOKENS, FEATURES, D = 512, 1024, 4  # weights and activations hardly weigh
# objectives that cost more than the default
COSTLY = {
    "relu": [{"p": 0.5}, {"preact": 1e-3}],
    "jumprelu": [{"preact": 1e-3}, {"penalty_kind": PenaltyKind.step}],
    "gated": [{"preact": 1e-3}],
}


X = torch.randn(TOKENS, D, generator=Generator().manual_seed(0))


def peak(compute) -> float:
    """Bytes for each token and feature at the peak of what `compute` does."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        compute()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    taken = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(taken)) / (TOKENS * FEATURES)


def peak_of_update(name: str, settings: dict) -> float:
    """That of forward and backward, half of the features dead."""
    config, _, objective = ARCHITECTURES[name]
    sae, loss = build_sae(config(name=name, features=FEATURES), D, D), objective(**settings)
    moment = TrainingStatus(torch.arange(FEATURES) < FEATURES // 2, torch.tensor(0.5))

    def forward():
        this = sae.training_pass(X)
        terms = loss.terms(sae, this, X, moment)
        (this.features.values > 0).sum(dim=0)
        weighted = (c * terms[each] for each, c in loss.coefficients().items())
        return sum(weighted, terms["mse"])

    def update():
        with torch.autocast("cpu", torch.bfloat16):
            total = forward()
        total.backward()

    return peak(update)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_update_takes_no_more_than_the_estimate_charges(name):
    measured = max(peak_of_update(name, settings) for settings in [{}, *COSTLY.get(name, [])])
    charged = ARCHITECTURES[name].network.bytes_per_activation
    assert 0.7 * charged < measured < charged + 0.5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_evaluation_takes_no_more_than_the_estimate_charges(name):
    config, network, _ = ARCHITECTURES[name]
    sae = build_sae(config(name=name, features=FEATURES), D, D)
    measured = peak(lambda: sae(X))
    assert measured < EVALUATION_SHARE * network.bytes_per_activation + 0.1


def group(folder, limit: object, used: int, cached: int, names=("max", "current"), total=""):
    """Make the files of a cgroup."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    stat = {"anon": used - cached, "inactive_file": 0, "active_file": 0}
    stat |= {f"{total}inactive_file": cached - 1, f"{total}active_file": 1}
    lines = (f"{name} {value}\n" for name, value in stat.items())
    (folder / "memory.stat").write_text("".join(lines))


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_that_any_cgroup_leaves_counts_and_cached_files_do_not(tmp_path, version):
    own, mount = tmp_path / "cgroup", tmp_path / "mount"
    if version == 2:
        own.write_text("0::/job/step\n")
        group(mount / "job", 1000, 700, 200)
        group(mount / "job" / "step", "max", 650, 200)
    else:
        own.write_text("5:cpuset:/\n4:memory:/job/step\n0::/\n")
        files = {"names": ("limit_in_bytes", "usage_in_bytes"), "total": "total_"}
        group(mount / "memory" / "job", 1000, 700, 200, **files)
        group(mount / "memory" / "job" / "step", 1 << 63, 650, 200, **files)
    assert memory._read_free_in_cgroups(own, mount) == 1000 - (700 - 200)


def test_no_cgroup_is_no_limit(tmp_path):
    assert memory._read_free_in_cgroups(tmp_path / "none", tmp_path) == float("inf")
    (tmp_path / "cgroup").write_text("0::/elsewhere\n")  # that of another mount
    assert memory._read_free_in_cgroups(tmp_path / "cgroup", tmp_path) == float("inf")


def test_ulimit_counts():
    most, _ = before = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, before[1]))
        assert 0.9e9 < memory._read_free_under_ulimit() <= 1.01e9
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    if most == resource.RLIM_INFINITY:
        assert memory._read_free_under_ulimit() == float("inf")


TOO_MUCH = 1 << 50


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(TOO_MUCH),
        lambda: np.empty(TOO_MUCH),
        lambda: pyarrow.allocate_buffer(TOO_MUCH),
        lambda: bytearray(TOO_MUCH),
        lambda: raise_(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        lambda: raise_(RuntimeError("std::bad_alloc")),
        lambda: raise_(OSError(12, os.strerror(12))),
    ],
)
def test_a_failed_allocation_of_any_library_is_known(allocate):
    with pytest.raises(Exception) as raised:
        allocate()
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), OSError(28, "full"), ValueError()])
def test_other_errors_are_no_failed_allocations(error):
    assert not is_out_of_memory(error)


def raise_(error):
    raise error
