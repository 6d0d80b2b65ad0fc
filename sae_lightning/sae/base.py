"""What every sparse autoencoder shares.

Shapes: d_in, d_out = widths of the source and target site; features = dictionary size;
batch = tokens. One orientation everywhere: a feature is a column of W_enc and a row of W_dec.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from sae_lightning.errors import UserError


@dataclass(slots=True, kw_only=True)
class SAEConfig:
    """The network, whatever its training objective."""

    name: str = "relu"
    """Architecture: a key of `sae_lightning.sae.ARCHITECTURES`."""
    features: int = 10_000
    """Dictionary size (number of features); may be smaller than the site's width."""
    decoder_norm: float = 0.1
    """Norm of a decoder row at the start (Anthropic, April 2024 update: 0.05 to 1, here 0.1)."""
    seed: int = 0
    """Seed of the weights' initialisation and of resampling; presets set it to the run's `seed`."""

    def __post_init__(self):
        if self.features < 1:
            raise UserError(f"model.features={self.features}: give at least 1 feature")
        if not self.decoder_norm > 0:
            raise UserError(f"model.decoder_norm={self.decoder_norm}: give a positive norm")


class Output(NamedTuple):
    """One forward pass of an SAE."""

    reconstruction: Tensor
    """[batch, d_out]"""
    features: Tensor
    """[batch, features], not negative"""


class SAE(nn.Module):
    """f = act(x W_enc + b_enc);  x_hat = f W_dec + b_dec.

    An architecture is a subclass that defines `encode`. Nothing here knows of coefficients or
    steps; b_dec is not subtracted from the input, because the input is already centred and
    b_enc can express the same.
    """

    architecture: str
    """The name that SAELens gives to this kind in `cfg.json`."""

    def __init__(self, config: SAEConfig, d_in: int, d_out: int, generator: Generator):
        """Anthropic's start: random decoder directions, encoder = decoder transposed, biases 0."""
        super().__init__()
        rows = torch.randn(config.features, d_out, generator=generator)
        rows *= config.decoder_norm / rows.norm(dim=1, keepdim=True)
        # A transcoder's encoder reads another space: its directions are drawn there.
        columns = rows
        if d_in != d_out:
            columns = torch.randn(config.features, d_in, generator=generator)
            columns *= config.decoder_norm / columns.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(columns.T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(config.features))
        self.W_dec = nn.Parameter(rows.clone())
        self.b_dec = nn.Parameter(torch.zeros(d_out))

    def encode(self, x: Tensor) -> Tensor:
        """Feature strengths [batch, features] of activations [batch, d_in]."""
        raise NotImplementedError

    def decode(self, features: Tensor) -> Tensor:
        """Reconstruction [batch, d_out] from feature strengths [batch, features]."""
        return features @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Output:
        """Reconstruct activations [batch, d_in]."""
        features = self.encode(x)
        return Output(self.decode(features), features)

    @torch.no_grad()
    def fold(
        self, in_mean: Tensor, in_scale: Tensor, out_mean: Tensor, out_scale: Tensor
    ) -> dict[str, Tensor]:
        """The weights that do for raw activations what these do for normalised ones.

        With z = (x - in_mean) / in_scale for the input and x_hat = z_hat out_scale + out_mean for
        the output, both affine maps merge with the encoder and the decoder. Computed in float64,
        returned in float32, on the CPU.
        """
        in_mean, in_scale, out_mean, out_scale = (
            value.cpu().double() for value in (in_mean, in_scale, out_mean, out_scale)
        )
        weights = {name: value.cpu().double() for name, value in self.state_dict().items()}
        W_enc = weights["W_enc"] / in_scale
        folded = {
            "W_enc": W_enc,
            "b_enc": weights["b_enc"] - in_mean @ W_enc,
            "W_dec": weights["W_dec"] * out_scale,
            "b_dec": weights["b_dec"] * out_scale + out_mean,
        }
        return {name: weight.float().contiguous() for name, weight in folded.items()}
