"""Runs a function in real processes that are connected as ranks."""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from sae_lightning.ranks import connect, disconnect

# Imported once, by a server that each process is a fork of
SLOW_IMPORTS = ["torch", "lightning", "datasets", "scipy.optimize", "tensorboard"]
SLOW_IMPORTS += ["transformers.models.llama.modeling_llama", "transformers.models.auto"]


def run_on_ranks(
    function: Callable[..., Any], folder: Path, sizes: Sequence[int] = (1, 2, 3)
) -> dict[int, list[Any]]:
    """Run function() on the ranks of worlds of several sizes -> {size: [value by rank]}. The same
    processes serve all sizes, one after the other, because they take seconds to start."""
    ports = {size: find_port() for size in sizes}
    multiprocessing.set_forkserver_preload(SLOW_IMPORTS)
    multiprocessing.start_processes(
        _serve, (function, ports, folder), nprocs=max(sizes), start_method="forkserver"
    )
    return {
        size: [torch.load(folder / f"{size}.{r}", weights_only=False) for r in range(size)]
        for size in sizes
    }


def find_port() -> int:
    """Find a free TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _serve(rank: int, function: Callable, ports: dict[int, int], folder: Path) -> None:
    torch.set_num_threads(1)
    for size, port in ports.items():
        if rank >= size:
            continue
        if size > 1:
            connect(rank, size, rank, "127.0.0.1", port, patience=60)
        torch.save(function(), folder / f"{size}.{rank}")
        disconnect()
