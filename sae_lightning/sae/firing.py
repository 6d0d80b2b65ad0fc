"""Encodes only the features that fire: of a large SAE, most are silent on a whole batch."""

import torch
from torch import Tensor

from sae_lightning.sae.base import SAE
from sae_lightning.sae.matrix import SomeColumns


@torch.no_grad()
def encode_firing(sae: SAE, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Strengths [batch, some] of the features that fire on a token of x [batch, d_in], 0 where not
    `keep` [batch], and their indices [some], ascending; bit for bit those of `sae.encode`.

    [batch, features] is the largest tensor by far, so it is read once: to find each feature's
    largest product. Biases, thresholds and strengths are computed for few features.
    """
    if sae.features_compete:
        strengths = sae.encode(x)
        units = torch.arange(strengths.shape[1], device=x.device)
    else:
        products = x @ sae.W_enc
        everyone = torch.arange(products.shape[1], device=x.device)
        # rounding is monotonic: the largest sum is that of the largest product
        fires = products.amax(dim=0) + sae.b_enc > sae.thresholds_for(everyone)
        units = everyone[fires]
        pre = products.index_select(1, units) + sae.b_enc[units]
        strengths = sae.compute_strengths(SomeColumns(pre, units))
    strengths[~keep] = 0
    fires = (strengths.amax(dim=0) > 0).nonzero().squeeze(1)
    return strengths.index_select(1, fires), units[fires]
