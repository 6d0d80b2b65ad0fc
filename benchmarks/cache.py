"""How much time does the activation cache save, and how long does it take to write it?

Trains the same SAE three times on the packaged LLM and text (without a cache, writing it, reading
it), prints the speeds side by side, and fails if the weights differ.

    python benchmarks/cache.py                      # 131,072 tokens, 2,048 features, layer 9
    python benchmarks/cache.py trainer.tokens=524288 model.features=10000
"""

import json
import tempfile
from pathlib import Path

from command import make_jobs, run_command
from rich.table import Table

from sae_lightning.formats.saelens import WEIGHTS
from sae_lightning.runs.passes import train_jobs
from sae_lightning.terminal import console

SETTINGS = ["trainer.tokens=131072", "model.features=2048", "layer.index=9"]


def main(overrides: list[str]) -> None:
    """Train the three SAEs and compare them."""
    table = Table("activations", "tokens/s", "LLM", "text, pool, disk", "SAE")
    weights = set()
    with tempfile.TemporaryDirectory() as temporary:
        folder, settings = Path(temporary), [*SETTINGS, *overrides]
        cached = [*settings, "data.cache=true", f"data.cache_folder={folder}/activations"]
        jobs = make_jobs([settings, cached, cached], folder)
        for name, job in zip(("from the LLM", "written", "read"), jobs, strict=True):
            train_jobs([job])
            speed = json.loads((job.folder / "metrics.json").read_text("utf8"))["speed"]
            # shares are not measured on a GPU
            shares = [speed.get(f"{part}_share") for part in ("llm", "data", "sae")]
            cells = ["" if share is None else f"{share:.1%}" for share in shares]
            table.add_row(name, f"{speed['tokens_per_second']:,.0f}", *cells)
            weights.add((job.folder / "sae" / WEIGHTS).read_bytes())
        files = [path for path in folder.glob("activations/**/*") if path.is_file()]
        table.caption = f"the cache takes {sum(f.stat().st_size for f in files) / 1e6:,.0f} MB"
    console.print(table)
    assert len(weights) == 1, "the three runs ended with different weights"


if __name__ == "__main__":
    run_command(main)
