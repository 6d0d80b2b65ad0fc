"""The best dense autoencoders, with at most as many features as dimensions.

x_hat = f @ W_dec + b_dec lies in an affine subspace of F dimensions. So no autoencoder with F
features, whatever its encoder, beats the first F principal directions (Eckart and Young 1936). A
ReLU autoencoder reaches this bound: if its biases keep every feature positive, it is linear. With
F = d the error is 0. So the bound follows from the covariance; networks are run to check it.

Shapes: d = width of the site, F = features of a dense autoencoder, n = tokens.
"""

from typing import Any

import torch
from torch import Tensor

from sae_lightning.sae import build_sae
from sae_lightning.sae.relu import DenseConfig
from sae_lightning.scoring.moments import Moments


def compare_dense(variances: Tensor, sample: Tensor, l0: float, mse: float) -> dict[str, Any]:
    """Compare the best dense autoencoders with an SAE, given its L0 and its `mse`: |x - x_hat|^2,
    averaged over tokens.

    variances: [d] along principal directions; sample: [n, d] activations to run networks on.
    """
    d, curve = len(variances), _compute_curve(variances)
    explained_variance = 1 - mse / variances.sum().item()
    # between whole numbers of features the curve is interpolated
    below = min(int(l0), d - 1)
    low, high = curve[below].item(), curve[below + 1].item()
    at_l0 = low + min(l0 - below, 1.0) * (high - low)
    worth = first = int((curve < explained_variance).sum())  # least F that explains as much
    if 0 < first <= d:
        low, high = curve[first - 1].item(), curve[first].item()
        worth = first - 1 + (explained_variance - low) / (high - low)
    sizes = sorted({max(1, d // 2), max(1, d - 1), d})  # with a small d, some are equal
    return {
        "l0": l0,
        "explained": explained_variance,
        "at_l0": at_l0,  # explained variance of as many dense features as the SAE's L0
        "worth": float(min(worth, d)),  # dense features that explain as much as the SAE
        "checks": [_run_dense(sample, size) for size in sizes],
        "curve": [round(value, 6) for value in curve.tolist()],  # with 0 ... d features
    }


def _compute_curve(variances: Tensor) -> Tensor:
    """[d + 1] explained variance of the best F-dimensional affine subspace, F = 0 ... d; NaN where
    nothing varies."""
    return torch.cat([torch.zeros(1).double(), variances.cumsum(0)]) / variances.sum()


def _run_dense(x: Tensor, features: int) -> dict[str, float]:
    """Build the best ReLU autoencoder of this many features for x [n, d]: it projects x - mean on
    the first principal directions. Return its explained variance on x, expected and measured."""
    moments = Moments()
    moments.add(x)
    variances, directions = moments.find_principal_directions()
    x, mean, directions = x.double(), moments.mean, directions[:features]
    lift = 1 - ((x - mean) @ directions.T).amin(dim=0)  # every feature is at least 1 on every token
    sae = build_sae(DenseConfig(name="dense", features=features), len(mean), len(mean)).double()
    sae.load_weights(
        {
            "W_enc": directions.T,
            "b_enc": lift - directions @ mean,
            "W_dec": directions,
            "b_dec": mean - lift @ directions,
        }
    )
    residual = x - sae.requires_grad_(False)(x).reconstruction
    return {
        "features": features,
        "expected": _compute_curve(variances)[features].item(),
        "measured": 1 - (residual.square().sum() / (variances.sum() * len(x))).item(),
    }
