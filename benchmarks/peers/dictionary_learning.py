"""dictionary_learning on the same work: its own `trainSAE`, its own folder, its own loader.

Optional, because it needs many packages (nnsight below 0.4 among them):

    pip install -c constraints.txt dictionary-learning==0.1.0

Its defaults are for hundreds of thousands of updates: a warm-up of 1,000 updates, a threshold from
update 1,000 on, and features that count as dead after 10 million tokens without firing. A run of
512 updates would end before these take effect, so they are set to shares of the run here, and the
learning rate is higher (not tuned). All else is as in the tool.
"""

import importlib.metadata
import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from peers.exchange import Run, make_run
from peers.work import Work
from torch import Tensor

from sae_lightning.terminal import phase

NAME, VERSION = "dictionary_learning", importlib.metadata.version("dictionary-learning")


class Recipe(NamedTuple):
    """Settings of one SAE."""

    architecture: str
    """Name of the architecture in this project."""
    label: str
    """Setting in which it differs from others of its architecture."""
    trainer: dict[str, Any]
    """Settings of its trainer."""
    lr: float = 1e-3
    """Peak learning rate; it rises over the first 5 % of the run and falls over the last 20 %."""


def _add_dead_window(trainer: type) -> type:
    """A subclass of `trainer` with `dead_window` as a setting: tokens until a feature is dead."""

    class Trainer(trainer):
        def __init__(self, dead_window: int, **settings: Any) -> None:
            super().__init__(**settings)
            self.dead_feature_threshold = dead_window

    return Trainer


RECIPES = [
    Recipe("relu", "l1=0.1", {"l1_penalty": 0.1}),
    Recipe("topk", "k=64", {"k": 64}),
    Recipe("batch_topk", "k=64", {"k": 64}),
    Recipe("matryoshka", "k=64", {"k": 64}),
]
TRAINERS = {
    "relu": StandardTrainerAprilUpdate,
    "topk": _add_dead_window(TopKTrainer),
    "batch_topk": _add_dead_window(BatchTopKTrainer),
    "matryoshka": _add_dead_window(MatryoshkaBatchTopKTrainer),
}


def train(recipe: Recipe, work: Work, folder: Path) -> None:
    """Train one SAE with trainSAE, which saves it in `folder`/trainer_0."""
    warm_up = work.steps // 20
    settings: dict[str, Any] = {"warmup_steps": warm_up, "decay_start": work.steps * 4 // 5}
    if recipe.architecture == "relu":
        settings |= {"sparsity_warmup_steps": warm_up}
    else:
        settings |= {
            "threshold_start_step": warm_up,
            "dead_window": work.steps // 16 * work.batch,
        }
    if recipe.architecture == "matryoshka":
        settings["group_fractions"] = [1 / 32, 1 / 32, 1 / 16, 1 / 8, 3 / 4]
    settings |= {
        "trainer": TRAINERS[recipe.architecture],
        "steps": work.steps,
        "activation_dim": work.d_in,
        "dict_size": work.features,
        "layer": work.layer,
        "lm_name": work.model_name,
        "lr": recipe.lr,
        "seed": work.seed,
        "device": "cpu",
    }
    with phase(f"{NAME} {recipe.architecture} {recipe.label}", total=work.steps) as advance:
        data = _Batches(work, advance)
        with redirect_stderr(io.StringIO()):  # hides its progress bars
            trainSAE(
                data,
                [settings | recipe.trainer],
                steps=work.steps,
                save_dir=str(folder),
                normalize_activations=True,
                device="cpu",
            )


class _Batches:
    """Batches that trainSAE iterates twice: first to estimate the scale, then to train."""

    def __init__(self, work: Work, advance: Callable[[int], None]) -> None:
        self.passes = [work.first_batches(), self._count_batches(work, advance)]

    def __iter__(self) -> Iterator[Tensor]:
        return self.passes.pop(0)

    @staticmethod
    def _count_batches(work: Work, advance: Callable[[int], None]) -> Iterator[Tensor]:
        for batch in work.batches():
            advance(1)
            yield batch


def load(folder: Path) -> tuple[Run, Tensor]:
    """Load the saved SAE with the tool's loader, as a function; also its decoder rows [F, d]."""
    sae, _ = load_dictionary(str(folder / "trainer_0"), device="cpu")
    rows = sae.W_dec if hasattr(sae, "W_dec") else sae.decoder.weight.T
    return make_run(sae), rows.detach()
