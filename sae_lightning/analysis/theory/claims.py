"""The claims of the theory behind SAEs, each measured on an SAE and the text that it reads.

    pass over text -> TheoryReducer -> measure_claims() -> TheoryResult -> make_theory_sections()

Shapes: n = tokens of a batch, d = width of the target site, active = features that fire in a batch,
fired = features that fired anywhere in the text.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_lightning.analysis.collect import EncodedBatch
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.theory.dense import compare_dense
from sae_lightning.analysis.theory.detection import FeatureCounts, NeuronCounts
from sae_lightning.analysis.theory.one_concept import (
    ConceptDetectors,
    compare_units,
    detect_concepts,
    read_blanked_vocabulary,
    tag_batch,
)
from sae_lightning.analysis.theory.overlap import Cosines, compare_directions
from sae_lightning.analysis.theory.token_concepts import CONCEPTS
from sae_lightning.sae.matrix import SparseMatrix
from sae_lightning.sae.sparse import SparsityPattern
from sae_lightning.scoring.moments import Moments
from sae_lightning.terminal import phase

DENSE_TOKENS = 2048  # tokens on which dense autoencoders are run
FEATURES_AT_ONCE = 16_384  # features whose weights are copied at a time: bounds memory


class TheoryResult(NamedTuple):
    """The numbers of `theory.json`, and what the page shows in figures and tables."""

    numbers: dict[str, Any]
    """Claim -> its numbers; also the numbers of tokens, features and fired features. `agreement`,
    `biases` and `overlap` need two fired features, `agreement` and `dense` an autoencoder."""
    l0_counts: Tensor
    """[features + 1] int64: number of tokens with 0, 1, 2, ... active features"""
    detectors: list[ConceptDetectors]
    """The units that detect each concept best, the most frequent concept first."""
    agreement: Tensor | None = None
    """[fired] cosines of W_enc[:, i] and W_dec[i]"""
    margin: Tensor | None = None
    """[fired] pre-activation minus threshold at the mean activation, in standard deviations"""
    competes: bool = False
    """True for TopK: the threshold is 0, and a feature must also be among the k strongest."""
    overlap: dict[str, Cosines] | None = None
    """Kind of directions (see `compare_directions`) -> cosines between them."""


class TheoryReducer:
    """Reducer that collects everything that `measure_claims` needs from the text."""

    def __init__(self, subject: Subject):
        sae, sites = subject.sae, subject.sites
        self.sae = sae
        self.is_autoencoder = sites.source == sites.target
        self.vocabulary = read_blanked_vocabulary(subject)
        self.source = Moments()
        self.target = self.source if self.is_autoencoder else Moments()
        self.feature_counts = FeatureCounts(len(CONCEPTS), subject.features, subject.device)
        self.neuron_counts = NeuronCounts(len(CONCEPTS))
        self.l0_counts = torch.zeros(subject.features + 1, dtype=torch.int64)
        self.squared_error = 0.0  # summed over tokens
        self.sample = torch.empty(0)  # [at most DENSE_TOKENS, d] target activations

    @torch.no_grad()
    def add(self, batch: EncodedBatch) -> None:
        keep = batch.keep
        if not keep.any():
            return
        strengths, active = batch.active_features
        x, y, strengths = batch.x[keep], batch.y[keep], strengths[keep]
        self.source.add(x)
        if not self.is_autoencoder:
            self.target.add(y)
        if len(self.sample) < DENSE_TOKENS:
            self.sample = torch.cat([self.sample, y[: DENSE_TOKENS - len(self.sample)].cpu()])
        self._add_reconstruction(x, y, strengths, active)
        is_member, half = tag_batch(batch, self.vocabulary)
        self.feature_counts.add(strengths, is_member, half, active)
        self.neuron_counts.add(x, is_member, half)

    def _add_reconstruction(self, x: Tensor, y: Tensor, strengths: Tensor, active: Tensor) -> None:
        """Add up the active features of each token and the squared error, from the strengths
        [n, active] of the features with the indices `active` [active]."""
        token, column = strengths.nonzero(as_tuple=True)
        l0 = torch.bincount(token, minlength=len(strengths))
        self.l0_counts += torch.bincount(l0.cpu(), minlength=len(self.l0_counts))
        # most features are silent: summing a few rows takes a tenth of a dense product's time
        features = self.sae.config.features
        places = token * features + active.to(token.device)[column]  # flat, in [n, features]
        pattern = SparsityPattern(places, len(x), features)
        decoded = self.sae.reconstruct(x, SparseMatrix(strengths[token, column], pattern))
        self.squared_error += (y - decoded).square().sum(dim=1).cpu().double().sum().item()


def measure_claims(subject: Subject, reducer: TheoryReducer) -> TheoryResult:
    """Test every claim, on the statistics that the reducer has collected."""
    with phase("testing the theory"):
        counts, tokens = reducer.feature_counts.result(), reducer.source.tokens
        all_tokens = len(CONCEPTS)  # index of the counts over all tokens
        # without bin 0, which counts the tokens on which a feature is silent
        firings = sum(counts.read(half, all_tokens)[:, 1:].sum(dim=1) for half in (0, 1))
        density = firings.double() / tokens
        detectors = detect_concepts(counts, reducer.neuron_counts.result())
        del counts, reducer.feature_counts  # large
        numbers = {
            "tokens": tokens,
            "features": len(density),
            "fired": int((density > 0).sum()),
            "activity": measure_activity(reducer.l0_counts, density),
            "detection": compare_units(detectors),
        }
        variances, directions = reducer.target.find_principal_directions()
        if reducer.is_autoencoder:
            l0, mse = density.sum().item(), reducer.squared_error / tokens
            numbers["dense"] = compare_dense(variances, reducer.sample, l0, mse)
        result = TheoryResult(numbers, reducer.l0_counts, detectors)
        if numbers["fired"] < 2:  # no pair to compare
            return result
        covariance_root = variances.sqrt()[:, None] * directions  # R with R.T @ R = covariance
        return _measure_weights(subject, reducer, density > 0, covariance_root, result)


def measure_activity(l0_counts: Tensor, density: Tensor) -> dict[str, float]:
    """Mean, standard deviation and quantiles of the L0, the number of active features on a token.

    l0_counts: [features + 1] number of tokens with an L0 of 0, 1, 2, ...; density: [features] share
    of tokens on which each feature fires.
    """
    l0 = torch.arange(len(l0_counts)).double()
    share = l0_counts.double() / l0_counts.sum()
    cumulative_share = l0_counts.double().cumsum(0) / l0_counts.sum()
    quantiles = {}
    for q in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1):
        # the smallest L0 that at least a share q of the tokens does not exceed; 1e-9 for rounding
        quantiles[f"{q:.0%}"] = int((cumulative_share <= max(q - 1e-9, 0)).sum())
    return {
        "mean": density.sum().item(),
        "deviation": (share @ (l0 - share @ l0).square()).sqrt().item(),
        "deviation_if_independent": (density * (1 - density)).sum().sqrt().item(),
    } | quantiles


def _measure_weights(
    subject: Subject,
    reducer: TheoryReducer,
    has_fired: Tensor,
    covariance_root: Tensor,
    result: TheoryResult,
) -> TheoryResult:
    """Add to `result` the biases, agreement and overlap of the features that fired. (The others may
    still be as initialised, with encoder = decoder transposed.) has_fired: [features] bool;
    covariance_root: [d, d]."""
    weights = {name: value.cpu() for name, value in subject.sae.weights().items()}
    encoder, decoder = weights["W_enc"].T[has_fired], weights["W_dec"][has_fired]
    margin = _measure_margins(weights, reducer.source)[has_fired]
    result.numbers["biases"] = summarise_distribution(margin.float()) | {
        "negative": (margin < 0).float().mean().item(),
        "raw_negative": (weights["b_enc"][has_fired] < 0).float().mean().item(),
        # active features per token if pre-activations were normally distributed
        "l0_if_normal": torch.special.ndtr(margin).sum().item(),
    }
    overlap = compare_directions(decoder, covariance_root)
    result.numbers["overlap"] = {kind: cosines.scalars() for kind, cosines in overlap.items()}
    result.numbers["overlap"]["rows"] = len(overlap["decoder"].nearest)
    agreement = None
    if reducer.is_autoencoder:
        parts = zip(encoder.split(FEATURES_AT_ONCE), decoder.split(FEATURES_AT_ONCE), strict=True)
        agreement = torch.cat(
            [(normalize(a, dim=1) * normalize(b, dim=1)).sum(dim=1) for a, b in parts]
        )
        result.numbers["agreement"] = summarise_distribution(agreement) | {
            "chance": decoder.shape[1] ** -0.5  # standard deviation for random directions
        }
    # features of BatchTopK and Matryoshka compete only in training: evaluation uses thresholds
    competes = subject.sae.architecture == "topk"
    return result._replace(margin=margin, competes=competes, overlap=overlap, agreement=agreement)


def _measure_margins(weights: dict[str, Tensor], source: Moments) -> Tensor:
    """How far each feature [features] is above its threshold at the mean activation, in standard
    deviations of its pre-activation: (mean @ W_enc[:, i] + b_enc[i] - threshold) / deviation.

    b_enc alone says little: on raw activations it also has to cancel mean @ W_enc[:, i].
    """
    W_enc, b_enc = weights["W_enc"], weights["b_enc"].double()
    threshold = weights.get("threshold", torch.zeros(()))  # an architecture without one fires at 0
    covariance = source.covariance
    means, variances = [], []  # of x @ W_enc
    for part in W_enc.split(FEATURES_AT_ONCE, dim=1):
        part = part.double()
        means.append(source.mean @ part)
        variances.append((part * (covariance @ part)).sum(dim=0))
    deviation = torch.cat(variances).clamp(min=0).sqrt()  # rounding can make a variance negative
    return (torch.cat(means) + b_enc - threshold) / deviation


def summarise_distribution(values: Tensor) -> dict[str, float]:
    """Mean, median, and 5 % and 95 % quantiles (`low`, `high`) of values [n], n > 0."""
    low, median, high = values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    return {"mean": values.mean().item(), "low": low, "median": median, "high": high}
