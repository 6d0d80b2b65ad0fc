"""Encodes only the features that fire: of a large SAE, most are silent on a whole batch."""

import torch
from torch import Tensor

from sae_lightning.sae.base import SAE
from sae_lightning.sae.matrix import SomeColumns


@torch.no_grad()
def encode_firing(sae: SAE, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Strengths [batch, n] and ascending indices [n] of the n features that fire on a token of x
    [batch, d_in] where `keep` [batch] is true. On these tokens the strengths are those of
    `sae.encode`, bit for bit; on all other tokens they are 0.

    x W_enc [batch, features] is by far the largest tensor. Unless features compete, it is read only
    once, for each feature's maximum, and strengths are computed only where the maximum suffices.
    """
    if sae.features_compete:
        strengths = sae.encode(x)
        indices = torch.arange(strengths.shape[1], device=x.device)
    else:
        products = x @ sae.W_enc
        indices = torch.arange(products.shape[1], device=x.device)
        # rounding is monotonic: the largest pre-activation is that of the largest product
        fires = products.amax(dim=0) + sae.b_enc > sae.thresholds_for(indices)
        indices = indices[fires]
        pre = products.index_select(1, indices) + sae.b_enc[indices]
        strengths = sae.compute_strengths(SomeColumns(pre, indices))
    strengths[~keep] = 0
    firing = (strengths.amax(dim=0) > 0).nonzero().squeeze(1)
    return strengths.index_select(1, firing), indices[firing]
