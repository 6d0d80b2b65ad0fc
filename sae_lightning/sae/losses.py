"""Terms of training objectives: pure functions of tensors.

Shapes: batch = tokens, d = width of the target site, features = dictionary size.
If the features are split over ranks, `features` means those of this rank; `l1`, `lp`, `tanh_l0` and
`preact` are sums over these features alone.
Units: normalised activations, whose mean square is 1 per element.
"""

import torch
from torch import Tensor

from sae_lightning.ranks import ALONE, Ranks


def mse(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Squared error, mean over [batch, d]."""
    return (reconstruction.float() - target).square().mean()


def l1(features: Tensor, norms: Tensor) -> Tensor:
    """Mean over the batch of sum_i(f_i * |W_dec_i|), for f [batch, features] and norms [features].
    Without the norms, f would shrink and W_dec grow (Conerly et al., Anthropic April 2024)."""
    # mean over the batch first, which saves a [batch, features] product; not `@`, which autocast
    # would compute in bf16
    return (features.float().mean(dim=0) * norms).sum()


def lp(
    features: Tensor, norms: Tensor, p: float, smooth: float = 0.01, ranks: Ranks = ALONE
) -> Tensor:
    """Mean over the batch of sum_i (f_i * |W_dec_i|)^p, rescaled so that its sum over all ranks
    equals that of `l1`.

    For 0 < p < 1 this pushes weak features towards 0 and spares strong ones. Rescaling keeps the
    penalty continuous while p falls (Karvonen et al. 2024, arXiv 2408.00113, section 3.2, rescale
    the coefficient instead). `smooth` bounds the slope at 0.
    """
    strengths = features.float() * norms
    powers = ((strengths + smooth) ** p - smooth**p).sum(dim=1).mean()
    with torch.no_grad():
        scale = ranks.sum(strengths.sum(dim=1).mean()) / ranks.sum(powers)
    return powers * scale.nan_to_num(0.0, 0.0, 0.0)  # 0 / 0 if no feature is active


def tanh_l0(features: Tensor, norms: Tensor, scale: float) -> Tensor:
    """Mean over the batch of sum_i tanh(scale * f_i * |W_dec_i|): a smooth count of active
    features (Conerly et al., Anthropic January 2025 update, with a scale of 4)."""
    return torch.tanh(scale * features.float() * norms).sum(dim=1).mean()


def auxk(residual: Tensor, pre: Tensor, rows: Tensor, k: int, ranks: Ranks = ALONE) -> Tensor:
    """Share of the variance of the residual [batch, d] that the k strongest dead features of each
    token do not explain (Gao et al. 2024, arXiv 2406.04093, appendix A.2); 0 if no feature is dead
    or the residual is constant.

    pre: pre-activations [batch, dead] of this rank's dead features; rows: their decoder rows
    [dead, d]. The residual gets no gradient.
    """
    (dead_count,) = ranks.sum_counts([len(rows)])
    if not dead_count:
        return residual.new_zeros(())
    residual = residual.detach().float()
    strengths = pre.relu()
    if k < dead_count:
        largest, indices = strengths.topk(min(k, len(rows)), dim=1, sorted=False)
        largest = ranks.keep_largest(largest, k)
        strengths = torch.zeros_like(strengths).scatter(1, indices, largest)
    variance = (residual - residual.mean(dim=0)).square().mean()
    # 0 if the variance is 0: dividing by it would make the gradient NaN
    factor = (1 / variance).nan_to_num(0.0, 0.0, 0.0)
    return mse(ranks.sum(strengths @ rows), residual) * factor


def preact(pre: Tensor, threshold: Tensor | float, norms: Tensor) -> Tensor:
    """Mean over the batch of the sum over dead features i of relu(threshold_i - pre_i) * |W_dec_i|,
    which pulls dead features up to their thresholds (Conerly et al., Anthropic January 2025
    update). pre [batch, dead]; threshold and norms [dead]."""
    shortfall = (threshold - pre.float()).relu().mean(dim=0)
    return (shortfall * norms.detach()).sum()
