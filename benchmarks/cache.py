"""What does the activation cache save, and what does writing it cost?

Trains the same SAE three times on the packaged LLM and text (from the LLM, writing the cache,
reading it), prints the speeds side by side, and stops if the weights are not the same.

    python benchmarks/cache.py                      # 131,072 tokens, 2,048 features, layer 9
    python benchmarks/cache.py trainer.tokens=524288 model.features=10000
"""

import json
import sys
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.table import Table

from sae_lightning.formats.export import WEIGHTS
from sae_lightning.runs.config import conf_folder
from sae_lightning.runs.jobs import job, register
from sae_lightning.runs.passes import train
from sae_lightning.terminal import console

SETTINGS = ["trainer.tokens=131072", "model.features=2048", "layer.index=9"]


def main(overrides: list[str]) -> None:
    """Run the three and compare them."""
    table = Table("activations", "tokens/s", "LLM", "text, pool, disk", "SAE")
    weights = set()
    register()
    with (
        initialize_config_dir(conf_folder(), version_base="1.3"),
        tempfile.TemporaryDirectory() as t,
    ):
        cached = ["data.cache=true", f"data.cache_folder={t}/activations"]
        for name, cache in (("from the LLM", []), ("written", cached), ("read", cached)):
            mine, folder = [*SETTINGS, *overrides, *cache], Path(t) / name
            train([job(compose("config", overrides=mine), folder, mine)])
            speed = json.loads((folder / "metrics.json").read_text("utf8"))["speed"]
            # not known on a GPU
            parts = [speed.get(f"{part}_share") for part in ("llm", "data", "sae")]
            shares = ["" if part is None else f"{part:.1%}" for part in parts]
            table.add_row(name, f"{speed['tokens_per_second']:,.0f}", *shares)
            weights.add((folder / "sae" / WEIGHTS).read_bytes())
        files = [path for path in Path(t, "activations").rglob("*") if path.is_file()]
        table.caption = f"the cache takes {sum(f.stat().st_size for f in files) / 1e6:,.0f} MB"
    console.print(table)
    assert len(weights) == 1, "the three runs ended with different weights"


if __name__ == "__main__":
    main(sys.argv[1:])
