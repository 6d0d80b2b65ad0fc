"""What held-out text says about an SAE: the one scoring that training and analysis share."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.llm.sites import Site
from sae_lightning.llm.splice import Scores
from sae_lightning.metrics import Quality, QualitySums
from sae_lightning.sae import Output
from sae_lightning.stream.held_out import HeldOut

ROWS = 4096  # tokens reconstructed at a time: bounds the memory that features take


class Scorecard(NamedTuple):
    """Everything that is measured on held-out text."""

    quality: Quality
    """Reconstruction and sparsity."""
    scores: Scores
    """What the LLM makes of the reconstruction."""

    def scalars(self) -> dict[str, float]:
        """The numbers by name."""
        quality = self.quality._asdict()
        del quality["density"]
        return quality | self.scores._asdict()


@torch.no_grad()
def score(
    reconstructs: Sequence[Callable[[Tensor], Output]],
    held_out: HeldOut,
    source: Site,
    target: Site,
) -> list[Scorecard]:
    """Score SAEs of one source and target, given as functions of raw activations [n, d_in].

    Runs in float32 whatever the training precision: it is what the saved SAE will do.
    """
    x, y = held_out.activations(source), held_out.activations(target)
    with torch.autocast(x.device.type, enabled=False):
        qualities = [_quality(reconstruct, x, y) for reconstruct in reconstructs]
        functions = [partial(_reconstruction, reconstruct) for reconstruct in reconstructs]
        scores = held_out.scores(source, target, functions)
    return [Scorecard(*pair) for pair in zip(qualities, scores, strict=True)]


def _quality(reconstruct: Callable[[Tensor], Output], x: Tensor, y: Tensor) -> Quality:
    """Quality on inputs [n, d_in] and targets [n, d_out]."""
    sums = QualitySums()
    for part, wanted in zip(x.split(ROWS), y.split(ROWS), strict=True):
        output = reconstruct(part.float())
        sums.add(wanted, output.reconstruction, output.features)
    return sums.result()


def _reconstruction(reconstruct: Callable[[Tensor], Output], x: Tensor) -> Tensor:
    return torch.cat([reconstruct(part).reconstruction.to(x.device) for part in x.split(ROWS)])


def rows(scalars: dict[str, float]) -> dict[str, str]:
    """A scorecard's numbers as lines for a person."""
    return {
        "L0": f"{scalars['l0']:.1f} active features per token",
        "explained variance": f"{scalars['explained_variance']:.4f}",
        "unfired": f"{scalars['unfired']:.1%} of features on this text",
        "CE recovered": f"{scalars['ce_recovered']:.4f}",
        "CE of the LLM": f"{scalars['ce_clean']:.3f} nats per token",
        "  with the SAE": f"{scalars['ce_spliced']:.3f}",
        "  mean-ablated": f"{scalars['ce_mean']:.3f}",
        "  zero-ablated": f"{scalars['ce_zero']:.3f}",
        "KL": f"{scalars['kl']:.4f} nats per token",
    }
