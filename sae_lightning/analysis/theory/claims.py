"""The claims of the theory behind SAEs, each measured on an SAE and the text that it reads.

    one pass over text -> TheoryReducers -> theory() -> Theory -> sections.sections()

Shapes: d = width of the site, d_in of the source; fired = features that fired on the text.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.survey.collect import Batch
from sae_lightning.analysis.theory.concepts import CONCEPTS, members
from sae_lightning.analysis.theory.dense import Dense, dense_autoencoders
from sae_lightning.analysis.theory.detection import (
    Counts,
    Detector,
    FeatureCounts,
    NeuronCounts,
    detect,
    drawn,
)
from sae_lightning.analysis.theory.moments import Moments, principal
from sae_lightning.analysis.theory.overlap import Cosines, Overlap, overlap
from sae_lightning.llm.load import special_ids
from sae_lightning.llm.vocabulary import vocabulary
from sae_lightning.terminal import phase

OCCURRENCES = 20  # tokens of a concept in each half, from where on a score means something
SAMPLE = 2048  # tokens on which dense autoencoders are run
KINDS = ("feature", "neuron", "few")


class Agreement(NamedTuple):
    """Encoder columns against decoder rows."""

    cosine: Tensor
    """[fired] of W_enc[:, i] and W_dec[i]"""
    chance: float
    """Standard deviation of random directions' cosines, 1 / sqrt(d)."""


class Biases(NamedTuple):
    """How far below its threshold a feature is at the mean activation.

    b_enc alone says little: for raw activations it holds what the mean adds to x W_enc.
    """

    margin: Tensor
    """[fired] (mean . W_enc[:, i] + b_enc[i] - threshold) / standard deviation over tokens"""
    raw: Tensor
    """[fired] b_enc as it is saved"""
    compete: bool
    """There is no threshold: a feature must also be among the k strongest (TopK)."""
    normal: float
    """Active features per token if pre-activations were normally distributed."""


class Activity(NamedTuple):
    """How many features are active on a token."""

    counts: Tensor
    """[features + 1] tokens with so many active features, int64"""
    density: Tensor
    """[features] share of tokens on which each fires"""

    @property
    def mean(self) -> float:
        """L0."""
        return self.density.sum().item()

    @property
    def deviation(self) -> float:
        """Standard deviation over tokens."""
        number = torch.arange(len(self.counts)).double()
        share = self.counts.double() / self.counts.sum()
        return (share @ (number - share @ number).square()).sqrt().item()

    @property
    def independent(self) -> float:
        """The same if features fired independently of one another."""
        return (self.density * (1 - self.density)).sum().sqrt().item()

    def quantile(self, share: float) -> int:
        """The least number that at least this share of tokens does not exceed."""
        up_to = self.counts.double().cumsum(0) / self.counts.sum()
        return int((up_to <= max(share - 1e-9, 0)).sum())  # of no share: the least that there is


class Detected(NamedTuple):
    """A concept, and the single units that stand for it best."""

    concept: str
    """Its name."""
    share: float
    """Share of the tokens that belong to it, in the half that is scored."""
    feature: Detector
    """Of the features."""
    neuron: Detector
    """Of the site's dimensions, in either direction."""
    few: Detector
    """Of as many features, by lot, as there are directions of neurons."""


class Theory(NamedTuple):
    """What was found."""

    tokens: int
    """Tokens that were read."""
    features: int
    """Features of the SAE."""
    fired: int
    """Those that fired on the text; what is said of directions and biases is of them."""
    agreement: Agreement | None
    """None where encoder and decoder are of different spaces, or fewer than two features fired."""
    biases: Biases | None
    """None where fewer than two features fired."""
    overlap: Overlap | None
    """None where fewer than two features fired."""
    activity: Activity
    detected: list[Detected]
    """Concepts that are frequent enough in both halves of the text."""
    dense: Dense | None
    """None for a transcoder: it does not reconstruct what it reads."""


class TheoryReducers:
    """All that `theory` needs of the text, in one reducer."""

    def __init__(self, subject: Subject):
        sae, sites = subject.sae, subject.sites
        self.sae = sae
        self.is_autoencoder = sites.source == sites.target
        self.words = vocabulary(subject.llm)
        for special in special_ids(subject.llm.tokenizer):
            self.words[special] = " "  # BOS opens a window, not a line
        self.source = Moments()
        self.target = self.source if self.is_autoencoder else Moments()
        self.feature = FeatureCounts(len(CONCEPTS), subject.features, subject.device)
        self.neuron = NeuronCounts(len(CONCEPTS))
        self.active = torch.zeros(subject.features + 1, dtype=torch.int64)
        self.residual = 0.0
        self.sample = torch.empty(0)  # [at most SAMPLE, d]

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Take in some more sequences."""
        keep = batch.keep
        if not keep.any():
            return
        x, y, features = batch.x[keep], batch.y[keep], batch.features[keep]
        self.source.add(x)
        if not self.is_autoencoder:
            self.target.add(y)
        if len(self.sample) < SAMPLE:
            self.sample = torch.cat([self.sample, y[: SAMPLE - len(self.sample)].cpu()])
        self._reconstruct(x, y, features)
        ids = batch.tokens.tolist()
        member = torch.stack([members([self.words[i] for i in row]) for row in ids])
        member = member.to(keep.device)[keep]
        half = (batch.ids.to(keep.device) % 2)[:, None].expand_as(keep)[keep]
        self.feature.add(features, member, half)
        self.neuron.add(x, member, half)

    def _reconstruct(self, x: Tensor, y: Tensor, features: Tensor) -> None:
        """Count active features, and add up the squared error."""
        token, unit = features.nonzero(as_tuple=True)
        number = torch.bincount(token, minlength=len(features))
        self.active += torch.bincount(number.cpu(), minlength=len(self.active))
        # most features are silent: a sum of few rows takes a tenth of a product with all
        decoded = embedding_bag(
            unit,
            self.sae.W_dec,
            number.cumsum(0) - number,
            mode="sum",
            per_sample_weights=features[token, unit],
        )
        silent = self.sae.reconstruct(x, features.new_zeros(1, features.shape[1]))
        self.residual += (y - decoded - silent).square().sum(dim=1).cpu().double().sum().item()


def theory(subject: Subject, reducers: TheoryReducers) -> Theory:
    """Every claim, from what a pass over text (`collect`) has left in the reducers."""
    with phase("testing the theory"):
        features, neurons = reducers.feature.result(), reducers.neuron.result()
        tokens = reducers.source.tokens
        density = features.counts[:, -1, :, 1:].sum(dim=(0, 2)).double() / tokens
        fired = density > 0
        several = fired.sum() > 1  # else there is no pair, and perhaps no feature
        weights = {name: value.cpu() for name, value in subject.sae.weights().items()}
        covariance = reducers.target.covariance
        activity = Activity(reducers.active, density)
        variances, directions = principal(covariance)
        return Theory(
            tokens=tokens,
            features=len(density),
            fired=int(fired.sum()),
            agreement=_agreement(weights, fired) if several and reducers.is_autoencoder else None,
            biases=_biases(weights, reducers.source, fired, subject.sae.architecture == "topk")
            if several
            else None,
            overlap=overlap(weights["W_dec"][fired], variances.sqrt()[:, None] * directions)
            if several
            else None,
            activity=activity,
            detected=_detected(features, neurons),
            dense=dense_autoencoders(
                variances, reducers.sample, activity.mean, reducers.residual / tokens
            )
            if reducers.is_autoencoder
            else None,
        )


def _agreement(weights: dict[str, Tensor], fired: Tensor) -> Agreement:
    # features that never fired are as they began: encoder = decoder transposed
    encoder, decoder = weights["W_enc"].T[fired], weights["W_dec"][fired]
    cosine = (normalize(encoder, dim=1) * normalize(decoder, dim=1)).sum(dim=1)
    return Agreement(cosine, chance=decoder.shape[1] ** -0.5)


def _biases(weights: dict[str, Tensor], source: Moments, fired: Tensor, compete: bool) -> Biases:
    W_enc, b_enc = weights["W_enc"].double(), weights["b_enc"].double()
    threshold = weights.get("threshold", torch.zeros(()))
    deviation = (W_enc * (source.covariance @ W_enc)).sum(dim=0).clamp(min=0).sqrt()
    margin = (source.mean @ W_enc + b_enc - threshold) / deviation
    return Biases(
        margin=margin[fired].float(),
        raw=b_enc[fired].float(),
        compete=compete,
        normal=torch.special.ndtr(margin[fired]).sum().item(),
    )


def _detected(features: Counts, neurons: Counts) -> list[Detected]:
    """Every concept that is there often enough, from the most frequent."""
    tokens = features.tokens
    few = drawn(features.counts.shape[2], 2 * neurons.counts.shape[2])
    found = [
        Detected(
            concept=CONCEPTS[i].name,
            share=(tokens[1, i] / tokens[1, -1]).item(),
            feature=detect(features, i),
            neuron=detect(neurons, i),
            few=detect(features, i, few),
        )
        for i in range(len(CONCEPTS))
        if tokens[:, i].min() >= OCCURRENCES
    ]
    return sorted(found, key=lambda each: -each.share)


def scalars(result: Theory) -> dict[str, Any]:
    """What `theory.json` holds: the numbers of each claim."""
    biases, activity, dense = result.biases, result.activity, result.dense
    found: dict[str, Any] = {
        "tokens": result.tokens,
        "features": result.features,
        "fired": result.fired,
        "activity": {
            "mean": activity.mean,
            "deviation": activity.deviation,
            "deviation_if_independent": activity.independent,
            **{f"{share:.0%}": activity.quantile(share) for share in (0, 0.05, 0.25, 0.5, 0.75)},
            **{f"{share:.0%}": activity.quantile(share) for share in (0.95, 1)},
        },
        "detection": _detection_scalars(result.detected),
    }
    if biases is not None:
        found["biases"] = spread(biases.margin) | {
            "negative": (biases.margin < 0).float().mean().item(),
            "raw_negative": (biases.raw < 0).float().mean().item(),
            "l0_if_normal": biases.normal,
        }
    if (found_overlap := result.overlap) is not None:
        found["overlap"] = {"rows": found_overlap.rows} | {
            name: _sizes(getattr(found_overlap, name)) for name in Overlap._fields[1:]
        }
    if result.agreement is not None:
        cosine = result.agreement.cosine
        found["agreement"] = spread(cosine) | {"chance": result.agreement.chance}
    if dense is not None:
        checks = [check._asdict() for check in dense.checks]
        numbers = {"l0": dense.l0, "explained": dense.explained, "at_l0": dense.at_l0}
        curve = [round(value, 6) for value in dense.curve.tolist()]
        found["dense"] = numbers | {"worth": dense.worth, "checks": checks, "curve": curve}
    return found


def spread(values: Tensor) -> dict[str, float]:
    """Mean, median, and the range in which nine of ten values [n] lie."""
    low, median, high = values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    return {"mean": values.mean().item(), "low": low, "median": median, "high": high}


def _sizes(cosines: Cosines) -> dict[str, float]:
    return {
        "median": cosines.size(0.5),
        "99%": cosines.size(0.99),
        "above_0.3": cosines.above(0.3),
        "nearest": cosines.nearest.mean().item(),
    }


def _detection_scalars(detected: list[Detected]) -> dict[str, Any]:
    each = [
        {"concept": one.concept, "share": one.share}
        | {kind: getattr(one, kind)._asdict() for kind in KINDS}
        for one in detected
    ]
    means = {
        f"{kind}_{score}": sum(one[kind][score] for one in each) / max(1, len(each))
        for kind in KINDS
        for score in ("f1", "auroc")
    }
    wins = sum(one.feature.f1 > one.neuron.f1 for one in detected)
    return {"concepts": len(each), "feature_wins": wins, **means, "each": each}
