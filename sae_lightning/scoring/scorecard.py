"""The scorecard: every metric of an SAE on held-out data, in training and analysis."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.llm.sites import Site
from sae_lightning.llm.splice import SpliceScores
from sae_lightning.ranks import FeatureSplit
from sae_lightning.sae import Output
from sae_lightning.scoring.dominance import DominantTokens, find_dominant_tokens
from sae_lightning.scoring.duplicates import COPY_COSINE, Copies, measure_copies
from sae_lightning.scoring.metrics import Fidelity, FidelitySums, Quality, QualitySums
from sae_lightning.stream.recovery import RECOVERED_COSINE, Recovery
from sae_lightning.stream.source import HeldOutData

# Limits on the tokens, and on tokens * features, that an SAE encodes at a time: bound memory.
MAX_TOKENS_AT_ONCE = 4096
MAX_ACTIVATIONS_AT_ONCE = 1 << 26


class UsualTokens(NamedTuple):
    """Explained variance of the usual tokens: all but the few that dominate the variance."""

    explained_variance: float
    dropped: int
    """Number of dominant tokens."""
    share: float
    """Share of the variance that the dominant tokens hold."""
    max_norm: float
    """The `data.max_norm` that leaves the dominant tokens out."""


class Scorecard(NamedTuple):
    """Everything that is measured on held-out data."""

    quality: Quality
    copies: Copies
    scores: SpliceScores | Recovery | None = None
    """The LLM's loss with the reconstruction in place (None if not measured) or, on synthetic
    data, the recovery of its concepts."""
    fidelity: Fidelity | None = None
    """Size and kind of the error, if requested."""
    usual: UsualTokens | None = None
    """None if no token is dominant."""

    def scalars(self) -> dict[str, float]:
        """All numbers but those of `fidelity`, by name, for `metrics.json`, curves and tables."""
        numbers = self.quality._asdict() | self.copies._asdict()
        del numbers["density"], numbers["dimension"]
        # `share` is that of the dominant tokens or dimension, `explained_variance` of all others
        parts = {"usual": self.usual, "dimension": self.quality.dimension}
        for prefix, part in parts.items():
            if part:
                numbers |= {f"{prefix}_{name}": value for name, value in part._asdict().items()}
        numbers |= self.scores._asdict() if self.scores else {}
        return {name: value for name, value in numbers.items() if value is not None}


@torch.no_grad()
def score_saes(
    saes: Sequence[Callable[[Tensor], Output]],
    decoders: Sequence[Tensor],
    held_out: HeldOutData,
    source: Site,
    target: Site,
    weights: Sequence[Callable[[], dict[str, Tensor]]] = (),
    *,
    fidelity: bool = False,
    splits: Sequence[FeatureSplit] = (),
) -> list[Scorecard]:
    """Score SAEs of one source and target site, given as functions of raw activations [n, d_in],
    with their decoder rows [features, d_out].

    `weights`, needed on synthetic concepts only: functions that return each SAE's weights for raw
    activations. `fidelity` adds the size and kind of the error, and the LLM's loss with the error
    alone; the loss takes one more forward pass for each SAE, so training leaves it out. `splits`:
    how each SAE's features are split over ranks, which then all call this function; empty if none
    is split. SAEs compute in float32, whatever the precision of training.
    """
    x, y = held_out.activations(source), held_out.activations(target)
    dominant = find_dominant_tokens(y)
    with torch.autocast(x.device.type, enabled=False):
        splits = splits or [FeatureSplit(len(decoder)) for decoder in decoders]
        features = max(split.features for split in splits)
        tokens = max(1, min(MAX_TOKENS_AT_ONCE, MAX_ACTIVATIONS_AT_ONCE // features))
        measured = [
            _measure_reconstruction(sae, x, y, dominant, fidelity, tokens, split)
            for sae, split in zip(saes, splits, strict=True)
        ]
        qualities, all_sums, usual_tokens = zip(*measured, strict=True)
        copies = [
            measure_copies(decoder, quality.density, split)
            for decoder, quality, split in zip(decoders, qualities, splits, strict=True)
        ]
        # for the LLM's loss with the error alone: reconstructions are replaced by their mean
        means = [sums.mean_reconstruction.float().to(y.device) for sums in all_sums if sums]
        scores = held_out.measure_saes(source, target, saes, weights, tokens, splits, means)
    fidelities = [sums.result() if sums else None for sums in all_sums]
    parts = zip(qualities, copies, scores, fidelities, usual_tokens, strict=True)
    return [Scorecard(*part) for part in parts]


def _measure_reconstruction(
    sae: Callable[[Tensor], Output],
    x: Tensor,
    y: Tensor,
    dominant: DominantTokens | None,
    fidelity: bool,
    tokens: int,
    split: FeatureSplit,
) -> tuple[Quality, FidelitySums | None, UsualTokens | None]:
    """Measure an SAE on inputs x [n, d_in] and targets y [n, d_out], `tokens` rows at a time."""
    quality_sums, usual_sums = QualitySums(), QualitySums()
    fidelity_sums = FidelitySums(y.cpu().double().mean(dim=0)) if fidelity else None
    usual = dominant.usual if dominant else torch.ones(len(x), dtype=torch.bool)
    parts = zip(x.split(tokens), y.split(tokens), usual.split(tokens), strict=True)
    for part, target, is_usual in parts:
        output = sae(part.float())
        quality_sums.add(target, output.reconstruction, output.features)
        if dominant and is_usual.any():
            reconstruction, features = output.reconstruction[is_usual], output.features[is_usual]
            usual_sums.add(target[is_usual], reconstruction, features)
        if fidelity_sums is not None:
            fidelity_sums.add(target, output.reconstruction)
    usual_tokens = dominant and UsualTokens(
        usual_sums.result().explained_variance,
        dominant.token_count,
        dominant.share,
        dominant.max_norm,
    )
    return quality_sums.result(split.join), fidelity_sums, usual_tokens


def format_lines(scalars: dict[str, float], noun: str = "text") -> dict[str, str]:
    """Format the numbers of a scorecard as label -> line. `noun`: a word for the held-out data."""
    quality = {
        "L0": f"{scalars['l0']:.1f} active features per token",
        "explained variance": f"{scalars['explained_variance']:.4f}",
        **_format_dominance(scalars),
        "unfired": f"{scalars['unfired']:.1%} of features on held-out {noun}",
        "copies": f"{scalars['duplicates']:.1%} of features that fire have another decoder row at "
        f"a cosine above {COPY_COSINE}; median nearest cosine {scalars['nearest_cosine']:.2f}",
    }
    llm = _format_llm_scores(scalars) if "ce_clean" in scalars else {}
    return quality | llm | (_format_recovery(scalars) if "recovered" in scalars else {})


def _format_dominance(scalars: dict[str, float]) -> dict[str, str]:
    """Lines on the explained variance without the tokens or the dimension that dominate it."""
    lines = {}
    if "usual_dropped" in scalars:
        lines["  of other tokens"] = (
            f"{scalars['usual_explained_variance']:.4f}; the {scalars['usual_dropped']:,} "
            f"of largest norm hold {scalars['usual_share']:.0%} of the variance "
            f"(data.max_norm={scalars['usual_max_norm']:g} leaves them out)"
        )
    if "dimension_index" in scalars:
        lines["  of other dimensions"] = (
            f"{scalars['dimension_explained_variance']:.4f}; dimension "
            f"{scalars['dimension_index']} holds {scalars['dimension_share']:.0%} of the variance"
        )
    return lines


def _format_llm_scores(scalars: dict[str, float]) -> dict[str, str]:
    error = {"  with the error": f"{scalars['ce_error']:.3f}"} if "ce_error" in scalars else {}
    return {
        "CE recovered": f"{scalars['ce_recovered']:.4f}",
        "CE of the LLM": f"{scalars['ce_clean']:.3f} nats per token",
        "  with the SAE": f"{scalars['ce_spliced']:.3f}",
        **error,
        "  mean-ablated": f"{scalars['ce_mean']:.3f}",
        "  zero-ablated": f"{scalars['ce_zero']:.3f}",
        "KL": f"{scalars['kl']:.4f} nats per token",
    }


def _format_recovery(scalars: dict[str, float]) -> dict[str, str]:
    return {
        "recovered": f"{scalars['recovered']:.1%} of concepts, at a cosine above "
        f"{RECOVERED_COSINE}",
        "mean max cosine": f"{scalars['mmcs']:.4f}; between concepts "
        f"{scalars['concept_overlap']:.4f}",
        "precision, recall": f"{scalars['precision']:.4f}, {scalars['recall']:.4f} of matched "
        "features as detectors",
        "strengths": f"{scalars['feature_readout']:.1%} of their variance read by features, "
        f"{scalars['projection_readout']:.1%} by projection",
        "encoder and decoder": f"cosine {scalars['encoder_agreement']:.4f}, "
        f"{scalars['negative_bias']:.1%} of biases below the threshold (0 if none)"
        if scalars["recovered"]
        else "no concept recovered",
    }
