"""What held-out data says about an SAE: the one scoring that training and analysis share."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.llm.sites import Site
from sae_lightning.llm.splice import Scores
from sae_lightning.sae import Output
from sae_lightning.scoring.metrics import Fidelity, FidelitySums, Quality, QualitySums
from sae_lightning.scoring.recovery import FOUND, Recovery, recovery
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.stream.synthetic import HeldOutConcepts

ROWS = 4096  # tokens reconstructed at a time: bounds the memory that features take


class Scorecard(NamedTuple):
    """Everything that is measured on held-out text or, where they are known, on concepts."""

    quality: Quality
    """Reconstruction and sparsity."""
    scores: Scores | None = None
    """What the LLM makes of the reconstruction; None where there is no LLM, or it was not asked."""
    recovery: Recovery | None = None
    """How much of the truth was found; None where it is not known."""
    fidelity: Fidelity | None = None
    """What kind of error is made, where it was asked for. Not among `scalars`, by which runs are
    compared: those hold its size, explained variance, in units that are the same for all."""

    def scalars(self) -> dict[str, float]:
        """The numbers by name."""
        quality = self.quality._asdict()
        del quality["density"]
        for more in (self.scores, self.recovery):
            quality |= more._asdict() if more else {}
        return quality


@torch.no_grad()
def score(
    reconstructs: Sequence[Callable[[Tensor], Output]],
    held_out: HeldOut | HeldOutConcepts,
    source: Site,
    target: Site,
    weights: Sequence[Callable[[], dict[str, Tensor]]] = (),
    *,
    fidelity: bool = False,
) -> list[Scorecard]:
    """Score SAEs of one source and target, given as functions of raw activations [n, d_in].

    Where the concepts are known, `weights` gives those of each SAE, for raw activations too.
    `fidelity` costs about a twentieth of what the SAE does: training can do without.
    Runs in float32 whatever the training precision: it is what the saved SAE will do.
    """
    x, y = held_out.activations(source), held_out.activations(target)
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(held_out, HeldOutConcepts):
            pairs = zip(reconstructs, weights, strict=True)
            return [
                _on_concepts(reconstruct, mine(), x, held_out, fidelity)
                for reconstruct, mine in pairs
            ]
        errors = [_errors(reconstruct, x, y, fidelity) for reconstruct in reconstructs]
        functions = [partial(_reconstruction, reconstruct) for reconstruct in reconstructs]
        scores = held_out.scores(source, target, functions)
    return [
        Scorecard(quality, mine, fidelity=kind)
        for (quality, kind), mine in zip(errors, scores, strict=True)
    ]


class _Errors:
    """Sums about reconstructions of targets [n, d_out]."""

    def __init__(self, y: Tensor, fidelity: bool):
        self.quality = QualitySums()
        self.fidelity = FidelitySums(y.cpu().double().mean(dim=0)) if fidelity else None

    def add(self, target: Tensor, output: Output) -> None:
        """Add some of the targets, and what an SAE makes of their inputs."""
        self.quality.add(target, output.reconstruction, output.features)
        if self.fidelity is not None:
            self.fidelity.add(target, output.reconstruction)

    def result(self) -> tuple[Quality, Fidelity | None]:
        """Of all that was added."""
        return self.quality.result(), self.fidelity and self.fidelity.result()


def _errors(
    reconstruct: Callable[[Tensor], Output], x: Tensor, y: Tensor, fidelity: bool
) -> tuple[Quality, Fidelity | None]:
    """On inputs [n, d_in] and targets [n, d_out]."""
    sums = _Errors(y, fidelity)
    for part, wanted in zip(x.split(ROWS), y.split(ROWS), strict=True):
        sums.add(wanted, reconstruct(part.float()))
    return sums.result()


def _on_concepts(
    reconstruct: Callable[[Tensor], Output],
    weights: dict[str, Tensor],
    x: Tensor,
    held_out: HeldOutConcepts,
    fidelity: bool,
) -> Scorecard:
    """Quality and recovery on samples [n, d_in], which the SAE sees once."""
    sums = _Errors(x, fidelity)

    def samples() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for part, strengths in zip(x.split(ROWS), held_out.strengths.split(ROWS), strict=True):
            output = reconstruct(part)
            sums.add(part, output)
            yield part.cpu(), strengths, output.features.cpu()

    found = recovery(held_out.world.directions, weights, samples())
    quality, kind = sums.result()
    return Scorecard(quality, recovery=found, fidelity=kind)


def _reconstruction(reconstruct: Callable[[Tensor], Output], x: Tensor) -> Tensor:
    return torch.cat([reconstruct(part).reconstruction.to(x.device) for part in x.split(ROWS)])


def title(scalars: dict[str, float]) -> str:
    """What a scorecard's numbers are measured on."""
    return "on held-out samples" if "recovered" in scalars else "on held-out text"


def rows(scalars: dict[str, float]) -> dict[str, str]:
    """A scorecard's numbers as lines for a person."""
    quality = {
        "L0": f"{scalars['l0']:.1f} active features per token",
        "explained variance": f"{scalars['explained_variance']:.4f}",
        "unfired": f"{scalars['unfired']:.1%} of features {title(scalars)}",
    }
    llm = _llm_rows(scalars) if "ce_clean" in scalars else {}
    return quality | llm | (_concept_rows(scalars) if "recovered" in scalars else {})


def _llm_rows(scalars: dict[str, float]) -> dict[str, str]:
    return {
        "CE recovered": f"{scalars['ce_recovered']:.4f}",
        "CE of the LLM": f"{scalars['ce_clean']:.3f} nats per token",
        "  with the SAE": f"{scalars['ce_spliced']:.3f}",
        "  mean-ablated": f"{scalars['ce_mean']:.3f}",
        "  zero-ablated": f"{scalars['ce_zero']:.3f}",
        "KL": f"{scalars['kl']:.4f} nats per token",
    }


def _concept_rows(scalars: dict[str, float]) -> dict[str, str]:
    return {
        "recovered": f"{scalars['recovered']:.1%} of concepts, at a cosine above {FOUND}",
        "mean max cosine": f"{scalars['mmcs']:.4f}; between concepts "
        f"{scalars['concept_overlap']:.4f}",
        "precision, recall": f"{scalars['precision']:.4f}, {scalars['recall']:.4f} of matched "
        "features as detectors",
        "strengths": f"{scalars['feature_readout']:.1%} of their variance read by features, "
        f"{scalars['projection_readout']:.1%} by projection",
        "encoder and decoder": f"cosine {scalars['encoder_agreement']:.4f}, "
        f"{scalars['negative_bias']:.1%} of biases (less thresholds) negative"
        if scalars["recovered"]
        else "no concept recovered",
    }
