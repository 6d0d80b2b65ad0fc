"""SAELens on the same work: its own trainer, its own folder format, its own loader.

The recipe `documented` is the example in SAELens' documentation: BatchTopK as recommended there,
and for the rest the defaults, which are meant for 30,000 updates. The other recipes keep the losses
and change what a run of 512 updates needs: a higher learning rate with a warm-up, normalised
activations for every architecture, and a dead feature window of a sixteenth of the run.
"""

import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import sae_lens
import torch
from peers.exchange import Run, make_run
from peers.work import NORM_BATCHES, Work
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_lightning.terminal import phase

NAME, VERSION = "SAELens", sae_lens.__version__


class Recipe(NamedTuple):
    """Settings of one SAE; shares are of the run's updates."""

    architecture: str
    """Name of the architecture in this project."""
    label: str
    """Setting in which it differs from others of its architecture."""
    sae: dict[str, Any]
    """Settings of SAELens' training SAE."""
    lr: float
    """Peak learning rate."""
    warm_up: float
    """Share over which the learning rate rises; over the last fifth it falls to 0."""
    dead_window: float | int
    """Updates without firing after which a feature is dead; a float is a share."""


class Share(float):
    """A setting that is a number of updates, given as a share of the run."""


SCALED = {"normalize_activations": "expected_average_only_in"}
L1 = SCALED | {"l1_warm_up_steps": Share(0.05)}
TANH = SCALED | {  # Anthropic's, which the documentation recommends
    "jumprelu_sparsity_loss_mode": "tanh",
    "jumprelu_bandwidth": 2.0,
    "jumprelu_init_threshold": 0.1,
    "pre_act_loss_coefficient": 3e-6,
    "l0_warm_up_steps": Share(1.0),
}


def _make_recipe(architecture: str, label: str, sae: dict[str, Any], lr: float = 3e-3) -> Recipe:
    return Recipe(architecture, label, sae, lr=lr, warm_up=0.05, dead_window=1 / 16)


# The learning rates 3e-4, 1e-3 and 3e-3 were tried over 512 updates of 128 tokens with 2,048
# features and scored on training text: 3e-3 was best for relu and batch_topk, 1e-3 for jumprelu.
# topk and matryoshka were not tried and get batch_topk's rate. For gated, 1e-3 and 3e-3 were tried,
# and ended at L0s that are too different for a choice.
RECIPES = [
    _make_recipe("relu", "l1=1", L1 | {"l1_coefficient": 1.0}),
    _make_recipe("topk", "k=64", SCALED | {"k": 64}),
    _make_recipe("batch_topk", "k=64", SCALED | {"k": 64}),
    Recipe("batch_topk", "k=64, documented", {"k": 64}, lr=3e-4, warm_up=0.0, dead_window=1000),
    _make_recipe("jumprelu", "l0=1", TANH | {"l0_coefficient": 1.0}, lr=1e-3),
    _make_recipe("gated", "l1=1", L1 | {"l1_coefficient": 1.0}),
    _make_recipe("matryoshka", "k=64", SCALED | {"k": 64}),
]
CLASSES = {
    "relu": "Standard",
    "topk": "TopK",
    "batch_topk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
    "matryoshka": "MatryoshkaBatchTopK",
}


def train(recipe: Recipe, work: Work, folder: Path) -> None:
    """Train one SAE with SAELens' trainer and save it as SAELens does."""
    torch.manual_seed(work.seed)
    settings = {
        name: round(value * work.steps) if isinstance(value, Share) else value
        for name, value in recipe.sae.items()
    }
    if recipe.architecture == "matryoshka":
        settings["matryoshka_widths"] = [work.features // n for n in (32, 16, 8, 4, 1)]
    kind = f"{CLASSES[recipe.architecture]}TrainingSAE"
    config = getattr(sae_lens, f"{kind}Config")(d_in=work.d_in, d_sae=work.features, **settings)
    config.metadata.model_name, config.metadata.hook_name = work.model_name, work.hook_name
    window = recipe.dead_window
    trainer = SAETrainerConfig(
        total_training_samples=work.steps * work.batch,
        train_batch_size_samples=work.batch,
        lr=recipe.lr,
        lr_end=recipe.lr / 10,
        lr_warm_up_steps=round(recipe.warm_up * work.steps),
        lr_decay_steps=work.steps // 5,
        dead_feature_window=round(window * work.steps) if isinstance(window, float) else window,
        n_batches_for_norm_estimate=min(NORM_BATCHES, work.steps),
        autocast=True,
    )
    scaled = config.normalize_activations != "none"
    with phase(f"SAELens {recipe.architecture} {recipe.label}", total=work.steps) as advance:

        def batches() -> Iterator[Tensor]:
            # SAELens estimates the scale on these; training then sees them again
            yield from work.first_batches() if scaled else ()
            for batch in work.batches():
                advance(1)
                yield batch

        with redirect_stderr(io.StringIO()):  # hides its progress bars
            sae = SAETrainer(trainer, getattr(sae_lens, kind)(config), batches()).fit()
    sae.save_inference_model(folder)


def load(folder: Path) -> tuple[Run, Tensor]:
    """Load the saved SAE with SAELens' loader, as a function; also its decoder rows [F, d]."""
    sae = sae_lens.SAE.load_from_disk(folder)
    return make_run(sae), sae.W_dec.detach()
