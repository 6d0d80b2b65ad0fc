"""How long does a sweep on one pass of the LLM take, compared with its runs one by one?

Runs `train.py -m ...` as a user does, with `hydra/launcher=one_pass` and with `basic`, which trains
one job after another in one process. Compares the wall times and the saved SAEs of both.

    python benchmarks/one_pass.py                      # block 20, 2,048 features, 8 values of l1
    python benchmarks/one_pass.py wide                 # block 9, 10,000 features, 3 values
    python benchmarks/one_pass.py trainer.tokens=20480 # any override; about 20 minutes without
"""

import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.table import Table

from sae_lightning.terminal import console

TRAIN = Path(__file__).parents[1] / "train.py"
TOKENS = "trainer.tokens=102400"
SWEEPS = {
    "narrow": [
        "layer.index=20",
        "model.features=2048",
        "loss.l1=1e-3,1.5e-3,2e-3,3e-3,4e-3,6e-3,8e-3,1e-2",
    ],
    "wide": ["layer.index=9", "model.features=10000", "loss.l1=1e-3,3e-3,1e-2"],
}


def run_sweep(launcher: str, overrides: list[str], folder: Path) -> tuple[float, dict[str, str]]:
    """Run a sweep; returns its seconds, and a hash of the SAE of each job."""
    command = [sys.executable, TRAIN, "-m", f"hydra/launcher={launcher}", *overrides]
    started = time.monotonic()
    subprocess.run([*command, f"hydra.sweep.dir={folder}"], check=True)
    seconds = time.monotonic() - started
    files = sorted(folder.glob("*/sae/sae_weights.safetensors"))
    return seconds, {
        file.parts[-3]: hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def main(arguments: list[str]) -> None:
    """Train one sweep both ways."""
    names = [name for name in arguments if name in SWEEPS] or ["narrow"]
    overrides = [argument for argument in arguments if argument not in SWEEPS]
    table = Table("sweep", "jobs", "one by one", "one pass", "ratio", "same SAEs")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            by_name = {o.partition("=")[0]: o for o in [*SWEEPS[name], TOKENS, *overrides]}
            settings = [*by_name.values()]
            seconds, hashes = run_sweep("one_pass", settings, Path(folder, "one_pass"))
            basic_seconds, basic_hashes = run_sweep("basic", settings, Path(folder, "basic"))
        table.add_row(
            name,
            str(len(hashes)),
            f"{basic_seconds:.0f} s",
            f"{seconds:.0f} s",
            f"{seconds / basic_seconds:.3f}",
            f"{sum(hashes[job] == basic_hashes.get(job) for job in hashes)} of {len(hashes)}",
        )
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
