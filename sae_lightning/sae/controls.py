"""Controls: SAEs that cannot learn something essential. If a control scores as high as a trained
SAE, the score does not show that the SAE has learned what the control cannot.

Shapes: batch = tokens, d = width of a site.
"""

from enum import Enum

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize


class Control(Enum):
    """What a control cannot learn; everything else is trained as in its leader.

    The first three are the baselines of Korznikov et al. 2026, "Sanity checks for sparse
    autoencoders" (arXiv 2602.14111, figure 1); pca is that of SAEBench (Karvonen et al. 2025, arXiv
    2503.09532). Shuffled activations are the null of a permutation test.
    """

    frozen_decoder = "decoder directions stay random"
    soft_frozen_decoder = "decoder directions stay near random ones"
    frozen_encoder = "encoder directions stay random"
    shuffled_activations = "trained on activations with independent dimensions"
    pca = "directions are principal components"


# Control -> the parameters that it does not train.
FROZEN_WEIGHTS = {
    Control.frozen_decoder: ("W_dec",),
    Control.frozen_encoder: ("W_enc",),
    Control.pca: ("W_enc", "W_dec"),
}
# A transcoder learns how its output depends on its input. Shuffling removes that dependence, and
# the principal components of two sites do not correspond.
NOT_FOR_TRANSCODERS = (Control.shuffled_activations, Control.pca)
# Least cosine between a soft-frozen decoder row and its start (Korznikov et al., figure 1).
LEAST_COSINE = 0.8


def permute_dimensions(x: Tensor, generator: Generator) -> Tensor:
    """Activations x [batch, d] with the tokens permuted in each dimension: a dimension keeps its
    values, but no longer depends on the others.

    All dimensions use one random permutation, shifted by a random offset for each dimension. So the
    elements of a row come from independently drawn tokens, as with d permutations.
    """
    batch, d = x.shape
    order = torch.randperm(batch, generator=generator).to(x.device)
    shifts = torch.randint(batch, (d,), generator=generator).to(x.device)
    shifted = torch.arange(batch, device=x.device)[:, None] + shifts
    return x.gather(0, order[shifted % batch])


def list_principal_directions(axes: Tensor) -> Tensor:
    """[2 d, d]: the unit vectors u_1, -u_1, u_2, -u_2, ... along principal axes [d, d] (rows). The
    largest element of each u_i is positive."""
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))  # [d, 1], with their signs
    axes = axes * largest.sign()
    return torch.stack([axes, -axes], dim=1).flatten(0, 1)


def limit_turn(rows: Tensor, starts: Tensor) -> Tensor:
    """Turn decoder rows [n, d] back towards their starts (unit vectors [n, d]) until their cosine
    is at least `LEAST_COSINE`; norms are kept."""
    norms = rows.norm(dim=1, keepdim=True)
    along = (rows * starts).sum(dim=1, keepdim=True)
    orthogonal = normalize(rows - along * starts)
    turned_back = LEAST_COSINE * starts + (1 - LEAST_COSINE**2) ** 0.5 * orthogonal
    return torch.where(along < LEAST_COSINE * norms, norms * turned_back, rows)
