"""Sparse autoencoders (torch only). One table row per architecture."""

from typing import NamedTuple

from torch import Generator

from sae_lightning.errors import UserError
from sae_lightning.sae.base import SAE, Output, SAEConfig
from sae_lightning.sae.relu import ReLU

__all__ = ["ARCHITECTURES", "SAE", "Architecture", "Output", "ReLU", "SAEConfig", "build"]


class Architecture(NamedTuple):
    """A row of the table."""

    config: type[SAEConfig]
    """Schema of the `model` group."""
    network: type[SAE]
    """The class it configures."""


ARCHITECTURES = {
    "relu": Architecture(SAEConfig, ReLU),
    "dense": Architecture(SAEConfig, ReLU),
}


def build(config: SAEConfig, d_in: int, d_out: int, generator: Generator | None = None) -> SAE:
    """The SAE that `config` describes, reading [batch, d_in] and writing [batch, d_out]."""
    if config.name not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise UserError(f"model.name={config.name}: no such architecture; choose from {names}")
    generator = generator or Generator().manual_seed(config.seed)
    return ARCHITECTURES[config.name].network(config, d_in, d_out, generator)
