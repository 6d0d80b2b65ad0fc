"""How much of its speed does a run keep while other processes use the same cores?

Starts `train.py` as a user does, in turn alone and beside one busy process per core. With a fair
share of the cores, a run keeps half of its speed.

    python benchmarks/neighbour.py                          # three rounds, about six minutes
    python benchmarks/neighbour.py rounds=5 model.features=10000
    python benchmarks/neighbour.py train=train.py,../other/train.py   # against another checkout
    OMP_WAIT_POLICY=active python benchmarks/neighbour.py   # with threads that spin while they wait

Speeds are those of `metrics.json`; everything but `rounds=` and `train=` is an override.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from rich.table import Table

from sae_lightning.terminal import console, phase

TRAIN = Path(__file__).parents[1] / "train.py"
SETTINGS = [
    "trainer=cpu",
    "model.features=2048",
    "trainer.batch=1024",
    "trainer.tokens=20480",
    "data.pool=16384",
    "eval.tokens=2048",
    "eval.loss_tokens=0",
]


@contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core busy with a process of its own inside the `with` block."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure_speed(train: Path, overrides: list[str]) -> float:
    """Run `train.py` once; returns tokens per second."""
    with tempfile.TemporaryDirectory() as folder:
        by_name = {setting.partition("=")[0]: setting for setting in [*SETTINGS, *overrides]}
        command = [sys.executable, train, *by_name.values(), f"hydra.run.dir={folder}/run"]
        subprocess.run(command, check=True, capture_output=True)
        metrics = json.loads(Path(folder, "run/metrics.json").read_text())
        return metrics["speed"]["tokens_per_second"]


def main(arguments: list[str]) -> None:
    """Measure every `train.py` alone and beside busy cores, one run after another."""
    options = dict(a.split("=", 1) for a in arguments if a.startswith(("rounds=", "train=")))
    overrides = [a for a in arguments if not a.startswith(("rounds=", "train="))]
    programs = [Path(p).absolute() for p in options.get("train", str(TRAIN)).split(",")]
    rounds = int(options.get("rounds", 3))
    alone: dict[Path, list[float]] = {program: [] for program in programs}
    beside: dict[Path, list[float]] = {program: [] for program in programs}
    with phase("measuring", total=2 * rounds * len(programs)) as advance:
        for _ in range(rounds):
            for program in programs:
                alone[program].append(measure_speed(program, overrides))
                advance(1)
            for program in programs:
                with busy_cores():
                    beside[program].append(measure_speed(program, overrides))
                advance(1)
    table = Table("program", "alone", "beside", "beside / alone", "alone / first's alone")
    for program in programs:
        a, b = median(alone[program]), median(beside[program])
        pairs = zip(alone[program], alone[programs[0]], strict=True)  # of the same round
        ratio = median(speed / first_speed for speed, first_speed in pairs)
        cells = f"{a:,.0f} tokens/s", f"{b:,.0f} tokens/s", f"{b / a:.2f}", f"{ratio:.3f}"
        table.add_row(str(program), *cells)
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
