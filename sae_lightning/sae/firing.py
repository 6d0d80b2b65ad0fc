"""Encodes only the features that fire: of a large SAE, most are silent on a whole batch."""

import torch
from torch import Tensor

from sae_lightning.sae.base import SAE
from sae_lightning.sae.matrix import SomeColumns


@torch.no_grad()
def encode_firing(sae: SAE, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Strengths [batch, n] and ascending indices [n] of the n features that fire on at least one
    token of x [batch, d_in] that is in `keep` [batch] bool. Strengths are those of `sae.encode`,
    bit for bit; other tokens have strengths of 0.

    [batch, features] is the largest tensor by far, so it is read once: to find each feature's
    largest product. Strengths are computed only for the features whose largest product is enough.
    """
    if sae.features_compete:
        strengths = sae.encode(x)
        indices = torch.arange(strengths.shape[1], device=x.device)
    else:
        products = x @ sae.W_enc
        indices = torch.arange(products.shape[1], device=x.device)
        # rounding is monotonic: the largest sum is that of the largest product
        fires = products.amax(dim=0) + sae.b_enc > sae.thresholds_for(indices)
        indices = indices[fires]
        pre = products.index_select(1, indices) + sae.b_enc[indices]
        strengths = sae.compute_strengths(SomeColumns(pre, indices))
    strengths[~keep] = 0
    firing = (strengths.amax(dim=0) > 0).nonzero().squeeze(1)
    return strengths.index_select(1, firing), indices[firing]
