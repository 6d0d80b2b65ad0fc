"""Terms of training objectives: pure functions of tensors.

Shapes: batch = tokens, d = width of the target site, features = dictionary size.
Units: activations are normalised to a mean square of 1 per element, so an mse of 1 is the error
of predicting the mean, whatever the model or the layer.
"""

import torch
from torch import Tensor


def mse(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Squared error, mean over [batch, d]."""
    return (reconstruction.float() - target).square().mean()


def l1(features: Tensor, norms: Tensor) -> Tensor:
    """Mean over the batch of sum_i f_i |W_dec_i|_2, for [batch, features] and the norms [features].

    The decoder norm keeps the optimiser from shrinking f and growing W_dec instead
    (Conerly et al., Anthropic April 2024 update).
    """
    # mean over the batch first: a [batch, features] product would be made only to be added up.
    # Not `@`, which autocast would compute in bf16.
    return (features.float().mean(dim=0) * norms).sum()


def lp(features: Tensor, norms: Tensor, p: float, smooth: float = 0.01) -> Tensor:
    """Mean over the batch of sum_i (f_i |W_dec_i|)^p, rescaled to the value that `l1` has.

    For 0 < p < 1 it presses on weak features and spares strong ones. The rescaling keeps the
    penalty continuous while p falls (Karvonen et al. 2024, arXiv 2408.00113, section 3.2, rescale
    the coefficient from step to step to the same end). `smooth` bounds the slope at 0.
    """
    strengths = features.float() * norms
    powers = ((strengths + smooth) ** p - smooth**p).sum(dim=1).mean()
    with torch.no_grad():
        scale = strengths.sum(dim=1).mean() / powers
    return powers * scale.nan_to_num(0.0, 0.0, 0.0)


def tanh_l0(features: Tensor, norms: Tensor, scale: float) -> Tensor:
    """Mean over the batch of sum_i tanh(scale f_i |W_dec_i|): a smooth count of active features.

    Conerly et al., Anthropic January 2025 update, with scale = 4.
    """
    return torch.tanh(scale * features.float() * norms).sum(dim=1).mean()


def auxk(residual: Tensor, pre: Tensor, rows: Tensor, k: int) -> Tensor:
    """Share of the residual's variance [batch, d] that the k strongest dead features leave.

    pre: pre-activations [batch, dead]; rows: their decoder rows [dead, d]. The residual is a given
    (detached), and b_dec, which has done its work in it, is not added again. 0 where nothing is
    dead or nothing is left (Gao et al. 2024, arXiv 2406.04093, appendix A.2).
    """
    if not len(rows):
        return residual.new_zeros(())
    residual = residual.detach().float()
    strengths = pre.relu()
    if k < len(rows):
        values, chosen = strengths.topk(k, dim=1, sorted=False)
        strengths = torch.zeros_like(strengths).scatter(1, chosen, values)
    variance = (residual - residual.mean(dim=0)).square().mean()
    # a factor of 0, since the gradient of 0 / 0 would be nan whatever becomes of the quotient
    share = (1 / variance).nan_to_num(0.0, 0.0, 0.0)
    return mse(strengths @ rows, residual) * share


def preact(pre: Tensor, threshold: Tensor | float, norms: Tensor) -> Tensor:
    """Mean over the batch of sum_dead relu(threshold - pre) |W_dec|: how far below its threshold
    a dead feature stays, so that it finds back (Conerly et al., Anthropic January 2025 update).

    Of dead features alone: pre-activations [batch, dead], thresholds and norms [dead].
    """
    missing = (threshold - pre.float()).relu().mean(dim=0)
    return (missing * norms.detach()).sum()
