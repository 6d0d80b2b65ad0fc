"""Does an encoder bias that learns sqrt(d) times as fast make a better ReLU SAE?

Trains both ways on the packaged LLM and text, on the same activations in the same order, and prints
the held-out figures side by side. About six minutes a run on two cores.

    python benchmarks/bias_lr.py                     # l1 = 1e-3, 4e-3
    python benchmarks/bias_lr.py trainer.tokens=131072 -- 3e-3 1e-2
"""

import sys
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.table import Table

from sae_lightning.runs.config import conf_folder
from sae_lightning.runs.jobs import job, register
from sae_lightning.runs.passes import train
from sae_lightning.terminal import console


def main(arguments: list[str]) -> None:
    """Run every l1 with both rates."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    overrides, coefficients = arguments[:split], arguments[split + 1 :] or ["1e-3", "4e-3"]
    table = Table("l1", "bias rate", "L0", "EV", "CE recovered", "unfired")
    register()
    with (
        initialize_config_dir(conf_folder(), version_base="1.3"),
        tempfile.TemporaryDirectory() as t,
    ):
        for l1 in coefficients:
            for name, rate in (("as the weights", "1"), ("sqrt(d) times", "null")):
                mine = [*overrides, f"loss.l1={l1}", f"optim.bias_lr={rate}"]
                folder = Path(t) / f"{l1}-{rate}"
                (metrics,) = train([job(compose("config", overrides=mine), folder, mine)])
                table.add_row(
                    l1,
                    name,
                    f"{metrics['l0']:.1f}",
                    f"{metrics['explained_variance']:.4f}",
                    f"{metrics['ce_recovered']:.4f}",
                    f"{metrics['unfired']:.2%}",
                )
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
