"""Runs a pass on all its ranks, which it starts unless a launcher has.

    python train.py trainer.devices=4      this process is rank 0 and starts ranks 1 to 3
    torchrun, srun, submitit               start all ranks; each reads its rank from the environment

Rank 0 reads the command line and sends each pass to the others, which train and print nothing.
"""

import atexit
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import torch

from sae_lightning import ranks
from sae_lightning.errors import UserError, is_out_of_memory
from sae_lightning.llm.placement import is_spread
from sae_lightning.ranks import RankLost, world
from sae_lightning.runs.cli import explain_error, format_error
from sae_lightning.runs.config import Config
from sae_lightning.runs.launchers import LaunchedRank, find_launched_rank, find_local_size
from sae_lightning.runs.plan import HeldOutResults, PlannedPass
from sae_lightning.runs.plugins import import_plugins
from sae_lightning.runs.run import run_pass
from sae_lightning.terminal import console, phase
from sae_lightning.training.settings import Accelerator

OUT_OF_MEMORY = "out of memory"
END_SECONDS = 10  # ranks that have not ended by themselves after this time are killed


def count_ranks(config: Config) -> int:
    """Number of ranks that train a pass. UserError if the settings do not fit the machine, or the
    ranks that a launcher has started."""
    trainer, llm = config.trainer, config.llm
    devices = None if trainer.devices == "auto" else trainer.devices  # of each machine
    # llm.device names one GPU, such as cuda:1, or llm.load spreads the LLM over several
    llm_is_placed = ":" in llm.device or is_spread(llm.load)
    gpus = torch.cuda.device_count() if _uses_gpus(config) else 0
    if launched := find_launched_rank():
        ranks_per_node = devices or launched.size // trainer.nodes
        if ranks_per_node * trainer.nodes != launched.size:
            raise UserError(
                f"trainer.devices={trainer.devices}, trainer.nodes={trainer.nodes}: "
                f"{launched.size} processes were started; leave both out, or start as many"
            )
        count = launched.size
    elif trainer.nodes > 1:
        raise UserError(
            f"trainer.nodes={trainer.nodes}: the processes of several machines are started by "
            "torchrun, srun or submitit (docs/clusters.md)"
        )
    elif devices is None:  # every GPU, or else the CPU
        return 1 if llm_is_placed or trainer.accelerator is Accelerator.cpu else max(1, gpus)
    else:
        count = devices
    local_ranks = count_local_ranks(config, count)
    one_gpu_each = launched and gpus == 1  # a launcher may make one GPU visible to each rank
    if 0 < gpus < local_ranks and not one_gpu_each:
        raise UserError(
            f"trainer.devices={trainer.devices}: {local_ranks} processes would share the {gpus} "
            f"GPUs that are visible here; use at most {gpus}"
        )
    if count > 1 and llm_is_placed:
        raise UserError(
            f"llm.device={llm.device}, llm.load.device_map: each of {count} processes would "
            "run the LLM there; leave them out, or train on one device"
        )
    return count


def _uses_gpus(config: Config) -> bool:
    """Whether SAEs or the LLM run on CUDA GPUs."""
    on_cpu = config.trainer.accelerator is Accelerator.cpu
    llm_on_cpu = not config.data_source.has_llm or config.llm.device == "cpu"
    return torch.cuda.is_available() and not (on_cpu and llm_on_cpu)


def count_local_ranks(config: Config, ranks: int | None = None) -> int:
    """Number of ranks on this machine. `ranks`: number on all machines; None: `count_ranks`."""
    return find_local_size() or (ranks or count_ranks(config)) // config.trainer.nodes


def count_threads(config: Config) -> int:
    """CPU threads of each rank: torch's number divided by the ranks. If a launcher or
    OMP_NUM_THREADS has set torch's number, it is for one rank already."""
    if find_launched_rank() or "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, torch.get_num_threads() // count_ranks(config))


class Followers:
    """Rank 0's handle on the other ranks, its followers: the processes that it has started, and
    the passes that it has sent."""

    def __init__(self) -> None:
        self.command = [sys.executable, "-m", "sae_lightning.runs.devices"]
        self.processes: list[subprocess.Popen] = []
        self.passes_sent = 0
        self.connected = False
        """Whether this process has connected to them or, in `release_followers`, has tried to."""

    def start(self, size: int) -> LaunchedRank:
        """Start ranks 1 to `size` - 1 on this machine; returns rank 0, this process."""
        with socket.socket() as probe:  # finds a free port
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        # if torchrun has started this process alone, its settings do not hold for these ranks
        env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        # torch logs a lost connection with its C++ stack; our own line is enough
        env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        for rank in map(str, range(1, size)):
            rank_env = env | {"RANK": rank, "LOCAL_RANK": rank}
            process = subprocess.Popen(self.command, env=rank_env, stdin=subprocess.DEVNULL)
            self.processes.append(process)
        return LaunchedRank(0, size, 0, "127.0.0.1", port)

    def check(self) -> None:
        """RankLost if a rank that this process has started has ended."""
        for rank, process in enumerate(self.processes, 1):
            if process.poll() is not None:
                raise RankLost(f"rank {rank} ended with exit code {process.returncode}")

    def send_pass(self, planned: PlannedPass | None) -> None:
        """Have all other ranks train a pass or, if it is None, end."""
        self.passes_sent += 1
        jobs = planned.jobs if planned else []
        plugins = sorted({name for job in jobs for name in job.config.plugins})
        # the pass is pickled by itself: ranks must import the plugins before they load it
        message = plugins, planned and pickle.dumps(planned)
        world().store_message(f"pass/{self.passes_sent}", pickle.dumps(message))

    def end(self) -> None:
        """Have all other ranks end after the passes that they were sent. Those that this process
        has started are killed if they take longer than END_SECONDS."""
        if world().size > 1:
            with suppress(RuntimeError):  # some ranks may be lost
                self.send_pass(None)
                deadline = monotonic() + END_SECONDS
                # adding 0 reads the counter that each other rank raises by 1
                while monotonic() < deadline and world().store.add("ended", 0) < world().size - 1:
                    sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """End the ranks that this process has started, at once."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes, self.passes_sent = [], 0
        ranks.disconnect()


followers = Followers()


def run_on_ranks(planned: PlannedPass) -> HeldOutResults:
    """Train a pass on all its ranks; returns the result of `run_pass`.

    If the pass fails, the ranks that this process has started end, and a later pass starts others.
    """
    size = len(planned.shares)
    if world().size not in (1, size):  # an earlier pass had another number of ranks
        followers.end()
    try:
        if world().size < size:
            with phase(f"starting {size} processes"):
                launched = find_launched_rank() or followers.start(size)
                patience = planned.jobs[0].config.trainer.patience
                ranks.connect(*launched, patience=patience, check=followers.check)
            followers.connected = True
            atexit.register(followers.end)
        if size > 1:
            followers.send_pass(planned)
        return run_pass(planned)
    except BaseException:
        if size > 1:
            followers.kill()
        raise


def release_followers() -> None:
    """On a rank 0 that a launcher has started: end the other ranks if no pass was sent to them,
    because nothing was left to train or an error came first."""
    if not followers.connected:
        followers.connected = True  # try once only
        with suppress(RankLost, RuntimeError):
            ranks.connect(*find_launched_rank(), patience=END_SECONDS * 6)  # some may be starting
            followers.end()


def follow() -> None:
    """Main loop of a rank other than 0: train each pass that rank 0 sends, until it sends None."""
    launched, passes_received = find_launched_rank(), 0
    console.quiet = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when to stop
    try:
        ranks.connect(*launched)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            passes_received += 1
            plugins, planned = pickle.loads(world().await_message(f"pass/{passes_received}"))
            if planned is None:
                break
            import_plugins(plugins)
            run_pass(pickle.loads(planned))
        world().store.add("ended", 1)
        ranks.disconnect()
    except SystemExit:  # from `run_pass`: rank 0 was stopped by Ctrl-C or SIGTERM
        os._exit(0)
    except BaseException as error:
        message = OUT_OF_MEMORY if is_out_of_memory(error) else explain_error(error, [])
        if message is None:
            traceback.print_exc()
        if not isinstance(error, RankLost):
            world().store_reason(message or f"{type(error).__name__}: {error}")
        elif launched.rank == 1 and "rank 0" in message:  # rank 0 is lost: one rank reports it
            sys.stderr.write(format_error(message) + "\n")
        sys.stderr.flush()
        # A normal exit would wait for lost ranks. Once connected, the exit code is 0, because a
        # launcher would otherwise end rank 0 before it can report the error.
        os._exit(0 if world().size > 1 else 1)


if __name__ == "__main__":
    follow()
