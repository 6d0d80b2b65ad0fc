"""What dense autoencoders can do, with fewer features than dimensions and with as many.

x_hat = f W_dec + b_dec lies in an affine subspace of F dimensions, so that no autoencoder with F
features, whatever its encoder, beats the F first principal directions (Eckart and Young 1936). ReLU
attains that bound: biases so large that every feature is always positive make it linear. With
F = d the error is 0. The curve therefore follows from the covariance; a network is run to show it.

Shapes: d = width of the site, F = features of a dense autoencoder, n = tokens.
"""

from typing import NamedTuple

from torch import Tensor

from sae_lightning.analysis.theory.moments import Moments, explained, principal
from sae_lightning.sae import SAE, SAEConfig, build


class Check(NamedTuple):
    """A dense autoencoder that was run."""

    features: int
    expected: float
    """Explained variance that the covariance of its tokens allows."""
    measured: float
    """Explained variance of its output."""


class Dense(NamedTuple):
    """Reconstruction against number of features, dense and sparse."""

    curve: Tensor
    """[d + 1] explained variance of the best dense autoencoder with F features, F = 0 ... d"""
    checks: list[Check]
    l0: float
    """Active features per token of the SAE."""
    explained: float
    """Its explained variance."""

    @property
    def at_l0(self) -> float:
        """Explained variance with as many dense features as the SAE's L0."""
        whole = min(int(self.l0), len(self.curve) - 2)
        low, high = self.curve[whole : whole + 2].tolist()
        return low + min(self.l0 - whole, 1.0) * (high - low)

    @property
    def worth(self) -> float:
        """Dense features that explain as much as the SAE; 0 where it explains nothing."""
        above = int((self.curve < self.explained).sum())  # the first that explains as much
        if above == 0:
            return 0.0
        if above == len(self.curve):
            return float(above - 1)
        low, high = self.curve[above - 1 : above + 1].tolist()
        return above - 1 + (self.explained - low) / (high - low)


def dense_autoencoders(variances: Tensor, sample: Tensor, l0: float, error: float) -> Dense:
    """The curve by the variances [d] along principal directions, beside an SAE of that L0 and mean
    squared error |x - x_hat|^2 of a token; networks are run on `sample` [n, d]."""
    d = len(variances)
    sizes = dict.fromkeys(max(1, size) for size in (d // 2, d - 1, d))
    return Dense(
        curve=explained(variances),
        checks=[_check(sample, size) for size in sizes],
        l0=l0,
        explained=1 - error / variances.sum().item(),
    )


def _check(x: Tensor, features: int) -> Check:
    """Run the best dense autoencoder of so many features on the tokens [n, d] it is made for."""
    moments = Moments()
    moments.add(x)
    variances, directions = principal(moments.covariance)
    sae = linear(moments.mean, directions[:features], x)
    measured = x.double() - sae(x.double()).reconstruction
    total = variances.sum() * len(x)
    return Check(
        features,
        expected=explained(variances)[features].item(),
        measured=1 - (measured.square().sum() / total).item(),
    )


def linear(mean: Tensor, directions: Tensor, x: Tensor) -> SAE:
    """The ReLU autoencoder, in float64, that projects x [n, d] on directions [F, d] through the
    mean [d]."""
    features, d = directions.shape
    along = (x.double() - mean) @ directions.T
    lift = 1 - along.amin(dim=0)  # every feature is at least 1 on every token
    sae = build(SAEConfig(name="dense", features=features), d, d).double()
    weights = {
        "W_enc": directions.T,
        "b_enc": lift - directions @ mean,
        "W_dec": directions,
        "b_dec": mean - lift @ directions,
    }
    sae.load_weights(weights)
    return sae.requires_grad_(False)
