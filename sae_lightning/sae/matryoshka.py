"""Matryoshka: nested dictionaries, each of which has to reconstruct by itself."""

from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from torch import Tensor
from torch.profiler import record_function

from sae_lightning.errors import UserError
from sae_lightning.sae.base import SAE, TrainingOutput
from sae_lightning.sae.batch_topk import BatchTopK
from sae_lightning.sae.losses import mse
from sae_lightning.sae.objective import AuxKLoss, TrainingStatus
from sae_lightning.sae.topk import TopKConfig


@dataclass(slots=True, kw_only=True)
class MatryoshkaConfig(TopKConfig):
    """A BatchTopK SAE with nested dictionaries."""

    groups: list[float] = field(default_factory=lambda: [1 / 32, 1 / 16, 1 / 8, 1 / 4])
    """Share of the features in each group but the last, which gets the rest. The dictionaries are
    the first group, the first two, and so on."""

    def __post_init__(self):
        TopKConfig.__post_init__(self)
        if not self.groups or min(self.groups) <= 0 or sum(self.groups) >= 1:
            raise UserError(
                f"model.groups={self.groups}: give positive shares of the features whose sum is "
                "below 1, such as [0.0625,0.25]"
            )
        if 0 in self.sizes():
            raise UserError(
                f"model.groups={self.groups}: one group would get none of "
                f"model.features={self.features}; give larger shares, or more features"
            )

    def sizes(self) -> list[int]:
        """Number of features in each group, including the last."""
        ends = [round(self.features * share) for share in accumulate(self.groups)]
        return [stop - start for start, stop in pairwise([0, *ends, self.features])]


class Matryoshka(BatchTopK):
    """f as in BatchTopK;  x_hat_m = f[:m] W_dec[:m] + b_dec for each dictionary of m features.

    Bussmann et al. 2025, "Learning multi-level features with matryoshka sparse autoencoders" (arXiv
    2503.17547): early features must reconstruct without the later ones, so they stay general.
    """

    def training_pass(self, x: Tensor, only_active: bool = False) -> TrainingOutput:
        """Reconstruct a batch [batch, d_in] with each dictionary, adding one group at a time."""
        pre, features = self.encode_batch(x, only_active)
        without_features = self.b_dec + x @ self.W_skip if self.config.skip else self.b_dec
        with record_function("decode"):
            groups = features.matmul_by_group(self._own_sizes(), self.W_dec)
            # sums[n]: the reconstruction from the first n groups
            sums = list(accumulate(map(self.split.ranks.sum, groups), initial=without_features))
        return TrainingOutput(x, sums[-1], features, pre, tuple(sums[1:-1]))

    def _own_sizes(self) -> list[int]:
        """Number of this rank's features in each group."""
        ends = accumulate(self.config.sizes(), initial=0)
        return [stop - start for start, stop in pairwise(map(self.split.count_own, ends))]


@dataclass(slots=True, kw_only=True)
class MatryoshkaLoss(AuxKLoss):
    """loss = (sum of mse(x_hat_m) over all dictionaries) + auxk * AuxK, where dead features
    reconstruct the residual. The largest dictionary has all features."""

    def terms(
        self, sae: SAE, output: TrainingOutput, target: Tensor, status: TrainingStatus
    ) -> dict[str, Tensor]:
        """The terms of `AuxKLoss` and "prefixes", the summed mse of all dictionaries but the
        largest."""
        terms = AuxKLoss.terms(self, sae, output, target, status)
        terms["prefixes"] = sum(mse(prefix, target) for prefix in output.prefixes)
        return terms

    def coefficients(self) -> dict[str, float]:
        return AuxKLoss.coefficients(self) | {"prefixes": 1.0}
