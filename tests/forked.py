"""Runs functions and scripts in new processes, forks of one that has imported the slow libraries.

In a fork, environment variables that libraries read when they are imported (HF_HOME, HF_ENDPOINT)
have no effect, and one cannot see what the script itself imports: tests of these start Python anew.
"""

import atexit
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import datasets
import torch
from rank_processes import SLOW_IMPORTS
from torch import multiprocessing

ROOT = Path(__file__).parents[1]


class Forked:
    """A process that calls `function(*arguments)` with one thread and ends."""

    def __init__(
        self, function: Callable, *arguments, cwd: Path | None = None, **environment: str
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(SLOW_IMPORTS)
        self._folder = TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        call = (function, arguments, cwd, environment, self._outputs)
        self._process = context.Process(target=_run, args=call)
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    def is_running(self) -> bool:
        return self._process.exitcode is None

    def wait_for(self, text: str) -> None:
        """Return once the process has printed `text`."""
        while text not in self._read(0):
            assert self.is_running(), self._read(1)
            time.sleep(0.02)

    def wait(self, timeout: float = 900) -> CompletedProcess:
        """Wait until the process has ended."""
        self._process.join(timeout)
        assert not self.is_running(), f"not done after {timeout} s"
        printed, errors = map(self._read, (0, 1))
        self._folder.cleanup()
        return CompletedProcess([], self._process.exitcode, printed, errors)

    def _read(self, output: int) -> str:
        file = self._outputs[output]
        return file.read_text("utf8") if file.exists() else ""


def run_script(script: str, *arguments: str, cwd: Path, **environment: str) -> CompletedProcess:
    """`python script arguments` in the folder `cwd`, with one thread; waits until it has ended."""
    return start_script(script, *arguments, cwd=cwd, **environment).wait()


def start_script(script: str, *arguments: str, cwd: Path, **environment: str) -> Forked:
    """Begin what `run_script` does."""
    return Forked(_run_path, script, arguments, cwd=cwd, **environment)


def _run_path(script: str, arguments: tuple[str, ...]) -> None:
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / script), run_name="__main__")


def _run(function, arguments, cwd, environment, outputs) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1"} | environment
    if cache := environment.get("HF_DATASETS_CACHE"):
        datasets.config.HF_DATASETS_CACHE = cache
    torch.set_num_threads(1)
    for descriptor, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    if cwd:
        os.chdir(cwd)
    try:
        function(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out before Python 3.13
