"""All GPU checks in one command: under eight minutes, without a network or the packaged LLM.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py only=products,speed
    python benchmarks/gpu_check.py only=speed trainer.tokens=4194304

    tests      those marked `gpu`
    products   `sparse.py`: times of dense and sparse products by density, in bf16 and fp32;
               `sae_lightning.sae.products.break_even_density` must return the density at which
               they are equal
    speed      `throughput.py gpu`: ReLU at L0 60 and TopK k = 32, 24,576 features, batch 8,192, on
               block 8 of an LLM of GPT-2 small's shape; the share of the floor, and a profile
    peers      `speed.py gpu`: the same beside SAELens, if it is installed

Each part has separate processes; a part that fails does not stop the others. Tables and JSON files
are written to `out` (outputs/gpu_check).
"""

import random
import subprocess
import sys
import time
from pathlib import Path

from command import run_command

from sae_lightning.errors import UserError
from sae_lightning.terminal import console

HERE = Path(__file__).resolve().parent
TEXT_BYTES = 16_000_000
TOKENS = 12_582_912  # half a minute at 500,000 tokens/s
PEER_TOKENS = 1_048_576  # enough, because SAELens' speed is constant


def main(arguments: list[str]) -> None:
    """Run the parts one after another."""
    options = dict(a.split("=", 1) for a in arguments if a.startswith(("out=", "only=")))
    overrides = [a for a in arguments if not a.startswith(("out=", "only="))]
    out = Path(options.get("out", "outputs/gpu_check")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    parts = list_parts(out, overrides)
    only = options.get("only", ",".join(parts)).split(",")
    if unknown := set(only) - set(parts):
        raise UserError(f"only={unknown.pop()}: no such part; choose from {', '.join(parts)}")
    for part in only:
        started = time.perf_counter()
        for number, command in enumerate(parts[part]):
            log = out / f"{part}-{number}.log"
            with log.open("w") as output:
                done = subprocess.run([sys.executable, *command], stdout=output, stderr=output)
            console.print(log.read_text("utf8")[-6000:], markup=False, highlight=False)
            if done.returncode:
                console.print(f"{part} failed: {log}")
        console.print(f"{part}: {time.perf_counter() - started:.0f} s")


def list_parts(out: Path, overrides: list[str]) -> dict[str, list[list[str]]]:
    """Part -> its commands, as arguments of Python."""
    text = write_text(out / "text.txt")
    work = ["gpu", "data=text", f"data.path={text}", f"trainer.tokens={TOKENS}", *overrides]
    sizes = ["features=24576", "d=768", "batch=8192", "device=cuda"]
    peers = [*work, "only=sae_lightning,saelens", "rounds=1", f"peer_tokens={PEER_TOKENS}"]
    return {
        "tests": [["-m", "pytest", "-q", "-m", "gpu", f"--rootdir={HERE.parent}", "tests"]],
        "products": [
            [f"{HERE}/sparse.py", *sizes, f"precision={precision}", f"out={out}/{precision}.json"]
            for precision in ("bf16", "fp32")
        ],
        "speed": [[f"{HERE}/throughput.py", *work, f"out={out / 'throughput'}"]],
        "peers": [[f"{HERE}/speed.py", *peers, f"out={out / 'speed'}"]],
    }


def write_text(file: Path) -> Path:
    """Write random words, 200 on a line, unless the file exists; returns the file."""
    if not file.exists():
        rng = random.Random(0)
        words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(5_000)]
        # 200 words take about 1,200 bytes
        lines = (" ".join(rng.choices(words, k=200)) for _ in range(TEXT_BYTES // 1_200))
        file.write_text("\n".join(lines), "utf8")
    return file


if __name__ == "__main__":
    run_command(main)
