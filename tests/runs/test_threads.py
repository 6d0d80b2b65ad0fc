"""Threads leave their cores to others only where there are others."""

import os

import psutil
import pytest

from sae_lightning.runs.threads import share_cores


@pytest.mark.parametrize(
    ("busy", "given", "policy"),
    [(100.0, None, "passive"), (10.0, None, None), (100.0, "active", "active")],
)
def test_waiting_threads_leave_their_cores_where_others_use_them(monkeypatch, busy, given, policy):
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: busy)
    monkeypatch.setattr(os, "environ", {"OMP_WAIT_POLICY": given} if given else {})
    share_cores()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
