"""Runs a script in a new process, a fork of one that has already imported the slow libraries.

In a fork, environment variables that libraries read when they are imported (HF_HOME, HF_ENDPOINT)
have no effect, and one cannot see what the script itself imports: tests of these start Python anew.
"""

import atexit
import os
import runpy
import sys
import traceback
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import datasets
import torch
from rank_processes import SLOW_IMPORTS
from torch import multiprocessing

ROOT = Path(__file__).parents[1]


def run_script(script: str, *arguments: str, cwd: Path, **environment: str) -> CompletedProcess:
    """`python script arguments` in the folder `cwd`, with one thread; waits until it has ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    with TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = context.Process(target=_run, args=(script, arguments, cwd, environment, outputs))
        process.start()
        process.join()
        return CompletedProcess(
            [script, *arguments], process.exitcode, *(file.read_text("utf8") for file in outputs)
        )


def _run(script, arguments, cwd, environment, outputs) -> None:
    os.chdir(cwd)
    os.environ |= {"OMP_NUM_THREADS": "1"} | environment
    if cache := environment.get("HF_DATASETS_CACHE"):
        datasets.config.HF_DATASETS_CACHE = cache
    torch.set_num_threads(1)
    for descriptor, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(ROOT))
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out before Python 3.13
