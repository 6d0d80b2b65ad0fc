"""Train sparse autoencoders on a language model's activations, and read what they found."""

from sae_lightning.errors import UserError
from sae_lightning.export import load_sae

__all__ = ["UserError", "load_sae"]
