"""Calls a function in a new process, so that its memory is measured and freed separately.

answer = call("timing.ours:measure", {"runs": ..., "folder": ...}, log=...)
"""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
LIMIT = 3600.0  # seconds after which a process is stopped


def make_name(*parts: str) -> str:
    """Join the parts that are not empty to a file name."""
    return "-".join(re.sub(r"[^\w.=+-]", "_", part) for part in parts if part)


class Failed(Exception):
    """The process did not start, took too long, or ended with an error; the message is one line."""


def call(function: str, settings: dict[str, Any], log: Path, python: str = sys.executable) -> Any:
    """Call `function` (as module:name) with `settings` in a new process; returns its result.

    The process's output goes to `log`. `python`: the interpreter of another tool's environment.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    command = [python, "-W", "ignore", str(HERE), function, json.dumps(settings), str(answer)]
    with log.open("w") as output:
        try:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT)
        except OSError as error:
            raise Failed(f"{python} cannot be started: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise Failed(f"not done after {LIMIT:,.0f} s (its output: {log})") from error
    if done.returncode or not answer.exists():
        lines = log.read_text("utf8", errors="replace").strip().splitlines() or ["no output"]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|error)\b", line)]
        raise Failed(f"{(errors or lines)[-1]} (all of it: {log})")
    return json.loads(answer.read_text("utf8"))


if __name__ == "__main__":
    sys.path[0] = str(HERE.parents[1])  # benchmarks/
    module, _, name = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(result), "utf8")
