"""TopK: the k strongest features of each token are active; the loss AuxK revives dead ones."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.sae import sparse
from sae_lightning.sae.base import SAE, SAEConfig, TrainingOutput
from sae_lightning.sae.sparse import SparsityPattern


@dataclass(slots=True, kw_only=True)
class TopKConfig(SAEConfig):
    """An SAE with a fixed number of active features."""

    k: int = 64
    """Active features per token (BatchTopK, Matryoshka: on average)."""
    start_bias: float = 0.0
    """Encoder biases at the start, in standard deviations of a pre-activation."""
    fixed_norm: bool = True
    """Keep every decoder row at the norm `decoder_norm`; false lets it grow and shrink."""

    def __post_init__(self):
        SAEConfig.__post_init__(self)
        if not 1 <= self.k <= self.features:
            raise UserError(
                f"model.k={self.k}: give a number from 1 to model.features={self.features}"
            )


class TopK(SAE):
    """f = the k largest of relu(x W_enc + b_enc), the others 0;  x_hat = f W_dec + b_dec.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093). By
    default, decoder rows have norm 1, so that the strengths of features are comparable.
    """

    architecture = "topk"
    features_compete = True
    bytes_per_activation = 27  # measured peak of an update

    def activate(self, pre: Tensor) -> Tensor:
        """The k largest pre-activations of each token, if positive; 0 in place of the others."""
        values, indices = pre.relu().topk(self._own_k, dim=-1, sorted=False)
        values = self.split.ranks.keep_largest(values, self.config.k)
        return torch.zeros_like(pre).scatter(-1, indices, values)

    def find_entries(self, x: Tensor) -> tuple[SparsityPattern, Tensor]:
        """Each token's k largest pre-activations, if they are positive."""
        pattern, values = sparse.encode_entries(x, self.W_enc, self.b_enc, self._find_largest)
        ranks, k = self.split.ranks, self.config.k
        strengths = ranks.keep_largest_entries(values, pattern.rows, len(x), k)
        pattern.has_zeros = ranks.size > 1  # `keep_largest_entries` sets some to 0
        return pattern.without_zeros(strengths)

    @property
    def _own_k(self) -> int:
        return min(self.config.k, len(self.split.own_features))

    def _find_largest(self, pre: Tensor) -> Tensor:
        """Flat indices, ascending, of the k largest values of each row, if they are positive."""
        indices = pre.topk(self._own_k, dim=1, sorted=False).indices.sort(dim=1).values
        row_starts = torch.arange(len(pre), device=pre.device)[:, None] * pre.shape[1]
        indices = (row_starts + indices).view(-1)
        return indices[sparse.find_above(pre.view(-1)[indices], 0)]

    def estimate_density(self, output: TrainingOutput) -> float:
        return self.config.k / self.config.features

    def saelens_settings(self) -> dict[str, Any]:
        """`k`, because SAELens would assume 100 without it."""
        return {"k": self.config.k}
