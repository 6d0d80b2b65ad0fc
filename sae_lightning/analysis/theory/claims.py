"""The claims of the theory behind SAEs, each measured on an SAE and the text that it reads.

    one pass over text -> TheoryReducers -> theory() -> Theory -> make_theory_sections()

Shapes: d = width of the target site; fired = features that fired on the text; active = features
that fire in a batch.
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
    compare_units,
    detect_concepts,
    read_words,
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


class Theory(NamedTuple):
    """The numbers of `theory.json`, and the tensors that the page's figures show."""

    numbers: dict[str, Any]
    """Claim -> its numbers. Agreement, biases and overlap are missing if fewer than two features
    fired, agreement and dense for a transcoder."""
    active: Tensor
    """[features + 1] int64: number of tokens with 0, 1, 2, ... active features"""
    agreement: Tensor | None = None
    """[fired] cosines of W_enc[:, i] and W_dec[i]"""
    margin: Tensor | None = None
    """[fired] pre-activation minus threshold at the mean activation, in standard deviations"""
    competes: bool = False
    """True for TopK: the threshold is 0, and a feature must also be among the k strongest."""
    overlap: dict[str, Cosines] | None = None
    """By kind of direction: `decoder`, `random` and `like_data` (see `compare_directions`)."""


class TheoryReducers:
    """Reducer that collects everything `theory` needs from the text."""

    def __init__(self, subject: Subject):
        sae, sites = subject.sae, subject.sites
        self.sae = sae
        self.is_autoencoder = sites.source == sites.target
        self.words = read_words(subject)
        self.source = Moments()
        self.target = self.source if self.is_autoencoder else Moments()
        self.feature = FeatureCounts(len(CONCEPTS), subject.features, subject.device)
        self.neuron = NeuronCounts(len(CONCEPTS))
        self.active = torch.zeros(subject.features + 1, dtype=torch.int64)
        self.residual = 0.0
        self.sample = torch.empty(0)  # [at most DENSE_TOKENS, d]

    @torch.no_grad()
    def add(self, batch: EncodedBatch) -> None:
        """Add a batch of sequences."""
        keep = batch.keep
        if not keep.any():
            return
        values, units = batch.active_features
        x, y, features = batch.x[keep], batch.y[keep], values[keep]
        self.source.add(x)
        if not self.is_autoencoder:
            self.target.add(y)
        if len(self.sample) < DENSE_TOKENS:
            self.sample = torch.cat([self.sample, y[: DENSE_TOKENS - len(self.sample)].cpu()])
        self._reconstruct(x, y, features, units)
        member, half = tag_batch(batch, self.words)
        self.feature.add(features, member, half, units)
        self.neuron.add(x, member, half)

    def _reconstruct(self, x: Tensor, y: Tensor, features: Tensor, units: Tensor) -> None:
        """Count active features and sum the squared error; features [n, active] are the strengths
        of the features `units` [active]."""
        token, unit = features.nonzero(as_tuple=True)
        per_token = torch.bincount(token, minlength=len(features))
        self.active += torch.bincount(per_token.cpu(), minlength=len(self.active))
        # most features are silent: summing a few rows takes a tenth of a dense product's time
        places = token * self.sae.config.features + units.to(token.device)[unit]
        pattern = SparsityPattern(places, len(x), self.sae.config.features)
        decoded = self.sae.reconstruct(x, SparseMatrix(features[token, unit], pattern))
        self.residual += (y - decoded).square().sum(dim=1).cpu().double().sum().item()


def theory(subject: Subject, reducers: TheoryReducers) -> Theory:
    """Test every claim on the sums in the reducers, after a pass over text (`collect`)."""
    with phase("testing the theory"):
        counts, tokens = reducers.feature.result(), reducers.source.tokens
        density = counts.counts[:, -1, :, 1:].sum(dim=(0, 2)).double() / tokens
        numbers = {
            "tokens": tokens,
            "features": len(density),
            "fired": int((density > 0).sum()),
            "activity": measure_activity(reducers.active, density),
            "detection": compare_units(detect_concepts(counts, reducers.neuron.result())),
        }
        del counts, reducers.feature  # gigabytes if there are very many features
        variances, directions = reducers.target.find_principal_directions()
        if reducers.is_autoencoder:
            l0, error = density.sum().item(), reducers.residual / tokens
            numbers["dense"] = compare_dense(variances, reducers.sample, l0, error)
        result = Theory(numbers, reducers.active)
        if numbers["fired"] < 2:  # no pair to compare
            return result
        spread_data = variances.sqrt()[:, None] * directions
        return _measure_weights(subject, reducers, density > 0, spread_data, result)


def measure_activity(active: Tensor, density: Tensor) -> dict[str, float]:
    """Distribution of the number of active features on a token.

    active: [features + 1] number of tokens with 0, 1, 2, ... active features; density: [features]
    share of tokens on which each feature fires.
    """
    number = torch.arange(len(active)).double()
    share = active.double() / active.sum()
    up_to = active.double().cumsum(0) / active.sum()
    # the quantile q is the smallest number that a share q of the tokens does not exceed
    quantiles = 0, 0.05, 0.25, 0.5, 0.75, 0.95, 1
    return {
        "mean": density.sum().item(),  # L0
        "deviation": (share @ (number - share @ number).square()).sqrt().item(),
        "deviation_if_independent": (density * (1 - density)).sum().sqrt().item(),
    } | {f"{q:.0%}": int((up_to <= max(q - 1e-9, 0)).sum()) for q in quantiles}


def _measure_weights(
    subject: Subject, reducers: TheoryReducers, fired: Tensor, data: Tensor, result: Theory
) -> Theory:
    """Add to `result` the biases, agreement and overlap of the features that fired; the others may
    still be as initialised, with encoder = decoder transposed. `data`: see `compare_directions`."""
    weights = {name: value.cpu() for name, value in subject.sae.weights().items()}
    encoder, decoder, b_enc = weights["W_enc"].T[fired], weights["W_dec"][fired], weights["b_enc"]
    margin = _measure_margins(weights, reducers.source)[fired]
    result.numbers["biases"] = summarise_distribution(margin.float()) | {
        "negative": (margin < 0).float().mean().item(),
        "raw_negative": (b_enc[fired] < 0).float().mean().item(),
        # active features per token if pre-activations were normally distributed
        "l0_if_normal": torch.special.ndtr(margin).sum().item(),
    }
    cosines = compare_directions(decoder, data)
    result.numbers["overlap"] = {kind: counted.scalars() for kind, counted in cosines.items()}
    result.numbers["overlap"]["rows"] = len(cosines["decoder"].nearest)
    agreement = None
    if reducers.is_autoencoder:
        parts = zip(encoder.split(FEATURES_AT_ONCE), decoder.split(FEATURES_AT_ONCE), strict=True)
        agreement = torch.cat(
            [(normalize(a, dim=1) * normalize(b, dim=1)).sum(dim=1) for a, b in parts]
        )
        result.numbers["agreement"] = summarise_distribution(agreement) | {
            "chance": decoder.shape[1] ** -0.5
        }
    competes = subject.sae.architecture == "topk"
    return result._replace(margin=margin, competes=competes, overlap=cosines, agreement=agreement)


def _measure_margins(weights: dict[str, Tensor], source: Moments) -> Tensor:
    """How far each feature [features] is above its threshold at the mean activation, in standard
    deviations of its pre-activation: (mean . W_enc[:, i] + b_enc[i] - threshold) / deviation.

    b_enc alone says little: on raw activations it also has to cancel mean . W_enc[:, i].
    """
    W_enc, b_enc = weights["W_enc"], weights["b_enc"].double()
    threshold = weights.get("threshold", torch.zeros(()))
    parts, covariance = W_enc.split(FEATURES_AT_ONCE, dim=1), source.covariance
    squares = [(part * (covariance @ part)).sum(dim=0) for part in map(Tensor.double, parts)]
    deviation = torch.cat(squares).clamp(min=0).sqrt()
    means = torch.cat([source.mean @ part.double() for part in parts])
    return (means + b_enc - threshold) / deviation


def summarise_distribution(values: Tensor) -> dict[str, float]:
    """Mean, median, and 5 % and 95 % quantiles of values [n]."""
    low, median, high = values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    return {"mean": values.mean().item(), "low": low, "median": median, "high": high}
