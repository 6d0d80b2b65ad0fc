"""Trains pickled lists of jobs, each on its own number of ranks: python on_ranks.py jobs.pickle

The number of ranks is in the jobs' configs. One process does it all, so that ranks start once for
all lists of the same size.
"""

import pickle
import subprocess
import sys
from pathlib import Path

from sae_lightning import UserError
from sae_lightning.runs import passes
from sae_lightning.runs.jobs import Job


def train_on_ranks(file: Path, *lists: list[Job], **options) -> subprocess.CompletedProcess:
    """Train lists of jobs in a new process, one list after the other."""
    start_on_ranks(file, *lists)
    return subprocess.run(command(file), capture_output=True, text=True, **options)


def start_on_ranks(file: Path, *lists: list[Job]) -> None:
    file.write_bytes(pickle.dumps(lists))


def command(file: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", __file__, str(file)]


if __name__ == "__main__":
    for jobs in pickle.loads(Path(sys.argv[1]).read_bytes()):
        try:
            passes.train_jobs(jobs)
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
