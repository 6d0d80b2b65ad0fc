"""Sparse autoencoders (torch only). Each architecture is a file and an entry of `ARCHITECTURES`."""

from typing import NamedTuple

from torch import Generator

from sae_lightning.errors import UserError
from sae_lightning.ranks import ALONE, Ranks
from sae_lightning.sae.base import SAE, Output, SAEConfig
from sae_lightning.sae.batch_topk import BatchTopK
from sae_lightning.sae.gated import Gated, GatedConfig, GatedLoss
from sae_lightning.sae.jumprelu import JumpReLU, JumpReLUConfig, JumpReLULoss
from sae_lightning.sae.matryoshka import Matryoshka, MatryoshkaConfig, MatryoshkaLoss
from sae_lightning.sae.objective import AuxKLoss, Loss, TrainingStatus
from sae_lightning.sae.relu import DenseConfig, DenseLoss, ReLU, ReLULoss
from sae_lightning.sae.topk import TopK, TopKConfig

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "Architecture",
    "Loss",
    "TrainingStatus",
    "Output",
    "SAEConfig",
    "build_sae",
    "count_parameters",
]


class Architecture(NamedTuple):
    """An entry of `ARCHITECTURES`: settings (the schema of the `model` group), the class that they
    configure, and objective (the schema of the `loss` group)."""

    config: type[SAEConfig]
    network: type[SAE]
    loss: type[Loss]


ARCHITECTURES = {
    "relu": Architecture(SAEConfig, ReLU, ReLULoss),
    "dense": Architecture(DenseConfig, ReLU, DenseLoss),
    "topk": Architecture(TopKConfig, TopK, AuxKLoss),
    "batch_topk": Architecture(TopKConfig, BatchTopK, AuxKLoss),
    "jumprelu": Architecture(JumpReLUConfig, JumpReLU, JumpReLULoss),
    "gated": Architecture(GatedConfig, Gated, GatedLoss),
    "matryoshka": Architecture(MatryoshkaConfig, Matryoshka, MatryoshkaLoss),
}


def build_sae(
    config: SAEConfig,
    d_in: int,
    d_out: int,
    generator: Generator | None = None,
    ranks: Ranks = ALONE,
) -> SAE:
    """The SAE that `config` describes, reading [batch, d_in] and writing [batch, d_out], with its
    features split over `ranks`. `generator` draws the weights (None: seeded with `config.seed`).
    UserError: an unknown architecture, or fewer features than ranks.
    """
    if config.name not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise UserError(f"model.name={config.name}: no such architecture; choose from {names}")
    if config.features < ranks.size:
        raise UserError(
            f"model.features={config.features}: give at least 1 feature for each of the "
            f"{ranks.size} devices, or use fewer devices"
        )
    generator = generator or Generator().manual_seed(config.seed)
    return ARCHITECTURES[config.name].network(config, d_in, d_out, generator, ranks)


def count_parameters(config: SAEConfig, d_in: int, d_out: int) -> int:
    """Number of parameters of the SAE that `config` describes, including frozen ones."""
    # W_enc and W_dec are matrices; the others of `per_feature` have one number per feature
    vectors = len(ARCHITECTURES[config.name].network.per_feature) - 2
    parameters = config.features * (d_in + d_out + vectors) + d_out
    return parameters + d_in * d_out if config.skip else parameters
