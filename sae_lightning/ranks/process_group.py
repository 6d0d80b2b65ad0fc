"""Joins the process group of a run's ranks, and leaves it."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from time import monotonic, sleep

import torch
import torch.distributed as dist

from sae_lightning.ranks.collectives import ALONE, RankLost, Ranks, close_connections

START_SECONDS = 600  # in which all ranks must start

_world = ALONE


def world() -> Ranks:
    """The ranks that this process trains with; ALONE until it connects to others."""
    return _world


def connect(
    rank: int,
    size: int,
    local_rank: int,
    address: str,
    port: int,
    launcher_listens: bool = False,
    restarts: int = 0,
    *,
    patience: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Ranks:
    """Join the process group of `size` ranks; on a machine with GPUs, each rank takes one.

    The ranks connect to a store at `address` and `port`, which rank 0 opens unless
    `launcher_listens`. `restarts`: how often the launcher has restarted all ranks. Rank 0 gives
    `patience`, the timeout of all ranks in seconds, and `check`, which raises if a rank ended.
    """
    global _world
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    is_server, timeout = rank == 0 and not launcher_listens, timedelta(seconds=START_SECONDS)
    store = dist.TCPStore(address, port, size, is_server, timeout, wait_for_workers=False)
    store = dist.PrefixStore(f"sae_lightning/{restarts}", store)
    ranks = Ranks(rank, size, local_rank, store)
    store.set(f"process/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
    if rank == 0:
        store.set("patience", str(patience))
        _await_ranks(store, size, check)
    timeout = timedelta(seconds=int(ranks.await_message("patience")))
    options = {"rank": rank, "world_size": size, "timeout": timeout}
    ranks.call_detecting_loss(dist.init_process_group, backend, store=store, **options)
    ranks.exchange_group = dist.new_group(timeout=timeout)
    _world = ranks
    return ranks


def _await_ranks(store: dist.Store, size: int, check: Callable[[], None]) -> None:
    """Wait until all ranks have started; RankLost after START_SECONDS. `check` as in `connect`."""
    deadline, missing = monotonic() + START_SECONDS, list(range(size))
    while missing := [rank for rank in missing if not store.check([f"process/{rank}"])]:
        check()
        if monotonic() > deadline:
            raise RankLost(f"rank {missing[0]} has not started within {START_SECONDS} s")
        sleep(0.05)


def disconnect() -> None:
    """Leave the process group: `world()` is ALONE again."""
    global _world
    _world = ALONE
    close_connections()
