"""What is looked at: an SAE, with the LLM that it reads."""

from typing import NamedTuple

import torch

from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLM
from sae_lightning.llm.sites import Sites
from sae_lightning.sae import SAE


class Subject(NamedTuple):
    """An SAE at its place in an LLM."""

    llm: LLM
    """Frozen, on its device."""
    sae: SAE
    """For raw activations, in float32, on the LLM's device."""
    sites: Sites
    """Where it reads and what it reconstructs."""
    keep_special: bool = False
    """Whether it was trained on special tokens too (but BOS)."""
    max_norm: float | None = None
    """It was trained on activations below this multiple of the median norm; None for all."""

    @property
    def features(self) -> int:
        """Number of features."""
        return self.sae.config.features

    @property
    def device(self) -> torch.device:
        """Where LLM and SAE are."""
        return self.sae.W_enc.device


def known(sae: SAE, features: list[int]) -> list[int]:
    """`features`; UserError if the SAE has no such feature."""
    for feature in features:
        if not 0 <= feature < sae.config.features:
            raise UserError(
                f"feature={feature}: this SAE has {sae.config.features:,} features; "
                f"give 0 to {sae.config.features - 1}"
            )
    return features
