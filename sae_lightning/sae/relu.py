"""The ReLU autoencoder; without a penalty on f it is the dense one."""

from torch import Tensor

from sae_lightning.sae.base import SAE


class ReLU(SAE):
    """f = relu(x W_enc + b_enc);  x_hat = f W_dec + b_dec.

    Bricken et al. 2023, "Towards Monosemanticity"; Conerly et al., "Update on how we train SAEs"
    (Anthropic, April 2024), which leaves the decoder's norms free and puts them in the penalty.
    """

    architecture = "standard"

    def encode(self, x: Tensor) -> Tensor:
        """Feature strengths [batch, features] of activations [batch, d_in]."""
        return (x @ self.W_enc + self.b_enc).relu()
