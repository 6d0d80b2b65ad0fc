"""What does each part of the recipe contribute, and how many features become copies of others?

Trains an SAE for each variant of the recipe, on one pass of the packaged LLM, and prints their
held-out metrics side by side. Takes an hour on two cores. docs/recipe.md has the results.

    python benchmarks/recipe.py                                  # ReLU
    python benchmarks/recipe.py model=gated only=as_is,dense_start
    python benchmarks/recipe.py only=as_is seeds=0,1,2           # model.seed
    python benchmarks/recipe.py trainer.tokens=131072 model.features=4096 eval.loss_tokens=0
"""

import tempfile
from pathlib import Path

from command import make_jobs, run_command
from rich.table import Table

from sae_lightning.errors import UserError
from sae_lightning.runs.passes import train_jobs
from sae_lightning.terminal import console

VARIANTS = {
    "as_is": [],
    "dense_start": ["model.start_bias=0"],
    "dense_start_small_rows": ["model.start_bias=0", "model.decoder_norm=0.1"],
    "small_rows": ["model.decoder_norm=0.1"],
    "fixed_rows": ["model.fixed_norm=true"],
    "biases_as_slow_as_weights": ["optim.bias_lr=1"],
    "lr_1e-3": ["optim.lr=1e-3"],
    "lr_6e-3": ["optim.lr=6e-3"],
}
COLUMNS = {
    "L0": ("l0", "{:.1f}"),
    "EV": ("explained_variance", "{:.4f}"),
    "CE recovered": ("ce_recovered", "{:.4f}"),
    "unfired": ("unfired", "{:.2%}"),
    "copies": ("duplicates", "{:.2%}"),
    "nearest": ("nearest_cosine", "{:.3f}"),
}
# one evaluation, at the end
SETTINGS = ["loss.target_l0=64", "eval.every=${trainer.tokens}"]


def main(arguments: list[str]) -> None:
    """Train every variant with every seed, and print their metrics."""
    options = dict(a.split("=", 1) for a in arguments if a.startswith(("only=", "seeds=")))
    overrides = [a for a in arguments if not a.startswith(("only=", "seeds="))]
    names = options["only"].split(",") if "only" in options else list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"only={name}: no such variant; choose from {', '.join(VARIANTS)}")
    pairs = [(name, seed) for name in names for seed in options.get("seeds", "0").split(",")]
    runs = [[*SETTINGS, *overrides, f"model.seed={seed}", *VARIANTS[name]] for name, seed in pairs]
    with tempfile.TemporaryDirectory() as folder:
        results = train_jobs(make_jobs(runs, Path(folder)))
    table = Table("variant", "seed", *COLUMNS)
    for name_and_seed, metrics in zip(pairs, results, strict=True):
        cells = [
            form.format(metrics[key]) if key in metrics else "–" for key, form in COLUMNS.values()
        ]
        table.add_row(*name_and_seed, *cells)
    console.print(table)


if __name__ == "__main__":
    run_command(main)
