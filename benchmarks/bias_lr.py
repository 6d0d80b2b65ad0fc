"""Does an encoder bias that learns sqrt(d) times as fast make a better ReLU SAE?

Trains both ways on the packaged LLM and text, on one pass, and prints the held-out figures side by
side. About 15 minutes on two cores.

    python benchmarks/bias_lr.py                     # l1 = 1e-3, 4e-3
    python benchmarks/bias_lr.py trainer.tokens=131072 -- 3e-3 1e-2
"""

import tempfile
from pathlib import Path

from command import command, make_jobs
from rich.table import Table

from sae_lightning.runs.passes import train
from sae_lightning.terminal import console

RATES = {"as the weights": "1", "sqrt(d) times": "null"}


def main(arguments: list[str]) -> None:
    """Run every l1 with both rates."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    overrides, coefficients = arguments[:split], arguments[split + 1 :] or ["1e-3", "4e-3"]
    rows = [(l1, name) for l1 in coefficients for name in RATES]
    runs = [[*overrides, f"loss.l1={l1}", f"optim.bias_lr={RATES[name]}"] for l1, name in rows]
    with tempfile.TemporaryDirectory() as folder:
        results = train(make_jobs(runs, Path(folder)))
    table = Table("l1", "bias rate", "L0", "EV", "CE recovered", "unfired")
    for row, metrics in zip(rows, results, strict=True):
        table.add_row(
            *row,
            f"{metrics['l0']:.1f}",
            f"{metrics['explained_variance']:.4f}",
            f"{metrics['ce_recovered']:.4f}",
            f"{metrics['unfired']:.2%}",
        )
    console.print(table)


if __name__ == "__main__":
    command(main)
