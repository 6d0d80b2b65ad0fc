"""Trains pickled lists of jobs, each on its own number of ranks: python on_ranks.py jobs.pickle

The number of ranks is in the jobs' configs. One process trains all lists, so that ranks start only
once for lists with the same number of ranks.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

from sae_lightning import UserError
from sae_lightning.runs import passes
from sae_lightning.runs.jobs import Job

ROOT = Path(__file__).parent.parent


def train_on_ranks(file: Path, *lists: list[Job], wait: bool = True) -> subprocess.Popen:
    """Train lists of jobs in a new process, one list after the other, with one thread; fails if
    that process does, unless it is not waited for."""
    file.write_bytes(pickle.dumps(lists))
    process = start([sys.executable, "-W", "ignore", __file__, str(file)])
    if wait:
        process.printed, process.errors = process.communicate(timeout=900)
        assert process.returncode == 0, process.printed[-3000:] + process.errors[-3000:]
    return process


def start(command: list[str], **options) -> subprocess.Popen:
    """Start a command whose output is read, with one thread for each process."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=env, text=True, **pipes, **options)


if __name__ == "__main__":
    for jobs in pickle.loads(Path(sys.argv[1]).read_bytes()):
        try:
            passes.train_jobs(jobs)
        except UserError as error:
            sys.exit(f"error: {error}")
