"""What every sparse autoencoder shares.

Shapes: d_in, d_out = widths of the source and target site; features = dictionary size;
batch = tokens. One orientation everywhere: a feature is a column of W_enc and a row of W_dec.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.profiler import record_function

from sae_lightning.errors import UserError
from sae_lightning.sae import sparse
from sae_lightning.sae.sparse import Entries

TINY = 1e-12  # a row of zeros stays one
SAMPLE = 128  # tokens of a batch by which its density is judged


@dataclass(slots=True, kw_only=True)
class SAEConfig:
    """The network, whatever its training objective."""

    name: str = "relu"
    """Architecture: a key of `sae_lightning.sae.ARCHITECTURES`."""
    features: int = 10_000
    """Dictionary size (number of features); may be smaller than the site's width."""
    decoder_norm: float = 0.1
    """Norm of a decoder row at the start (Anthropic, April 2024 update: 0.05 to 1, here 0.1)."""
    fixed_norm: bool = False
    """Keep every decoder row at that norm; false lets it grow and shrink."""
    skip: bool = False
    """Add x W_skip to the reconstruction: only for a transcoder (`layer.target`)."""
    seed: int = 0
    """Seed of the weights' initialisation and of resampling; presets set it to the run's `seed`."""

    def __post_init__(self):
        if self.features < 1:
            raise UserError(f"model.features={self.features}: give at least 1 feature")
        if not 0 < self.decoder_norm < math.inf:
            raise UserError(f"model.decoder_norm={self.decoder_norm}: give a positive norm")


class Output(NamedTuple):
    """One forward pass of an SAE."""

    reconstruction: Tensor
    """[batch, d_out]"""
    features: Tensor
    """[batch, features], not negative"""


class Pass(NamedTuple):
    """One forward pass in training: what objectives are made of.

    Of [batch, features] there are all entries (a tensor) or those that may differ from 0.
    """

    x: Tensor
    """[batch, d_in]"""
    reconstruction: Tensor
    """[batch, d_out]"""
    features: Tensor | Entries
    """[batch, features], not negative"""
    pre: Tensor | Entries
    """[batch, features], before the activation function"""
    prefixes: tuple[Tensor, ...] = ()
    """Reconstructions [batch, d_out] by the first features alone, where a class has them"""
    gate: Tensor | Entries | None = None
    """[batch, features], how far gates are open, where a class has them"""


class SAE(nn.Module):
    """f = activate(x W_enc + b_enc);  x_hat = f W_dec + b_dec (+ x W_skip).

    An architecture is a subclass that defines `activate`. Nothing here knows of coefficients or
    steps; b_dec is not subtracted from the input, because the input is already centred and
    b_enc can express the same.
    """

    architecture: str
    """The name that SAELens gives to this kind in `cfg.json`."""
    bytes_per_activation: int
    """Memory of an update for each token and feature, at its peak: what forward saves and backward
    makes, in mixed precision, with half of the features dead and the costliest objective."""
    per_feature = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
    """The parameters that have an entry for each feature, and along which dimension."""
    biases = ("b_enc",)
    """Parameters that stand beside a sum of d_in weights and have to keep pace with it: they learn
    `optim.bias_lr` times as fast."""

    def __init__(self, config: SAEConfig, d_in: int, d_out: int, generator: Generator):
        """Anthropic's start: random decoder directions, encoder = decoder transposed, biases 0."""
        super().__init__()
        self.config = config
        rows = torch.randn(config.features, d_out, generator=generator)
        rows *= config.decoder_norm / rows.norm(dim=1, keepdim=True)
        # A transcoder's encoder reads another space: its directions are drawn there.
        columns = rows
        if d_in != d_out:
            columns = torch.randn(config.features, d_in, generator=generator)
            columns *= config.decoder_norm / columns.norm(dim=1, keepdim=True)
        # Not contiguous: in memory a feature's column lies together, as its decoder row does, so
        # that sparse products write their gradient as it is.
        self.W_enc = nn.Parameter(columns.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(config.features))
        self.W_dec = nn.Parameter(rows.clone())
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(d_in, d_out))

    def pre_activations(self, x: Tensor) -> Tensor:
        """[batch, features] of activations [batch, d_in]."""
        return x @ self.W_enc + self.b_enc

    def pre_activations_of(self, features: Tensor, this: Pass) -> Tensor:
        """[batch, n] of some features [n], whether they are active or not."""
        if not isinstance(this.pre, Entries):
            return this.pre[:, features]
        # rows of the transpose lie together
        return this.x @ self.W_enc.T[features].T + self.b_enc[features]

    def activate(self, pre: Tensor) -> Tensor:
        """Feature strengths of pre-activations, both [batch, features], token by token."""
        raise NotImplementedError

    def activate_batch(self, pre: Tensor) -> Tensor:
        """`activate` in training, where tokens of a batch may share what is allowed to fire."""
        return self.activate(pre)

    def encode(self, x: Tensor) -> Tensor:
        """Feature strengths [batch, features] of activations [batch, d_in]."""
        return self.activate(self.pre_activations(x))

    def decode(self, features: Tensor) -> Tensor:
        """What features [batch, features] say of the reconstruction [batch, d_out]."""
        return features @ self.W_dec + self.b_dec

    def reconstruct(self, x: Tensor, features: Tensor | Entries) -> Tensor:
        """Reconstruction [batch, d_out] from features and, with a skip connection, the input."""
        if isinstance(features, Entries):
            decoded = sparse.decode(features, self.W_dec) + self.b_dec
        else:
            decoded = self.decode(features)
        return decoded + x @ self.W_skip if self.config.skip else decoded

    def forward(self, x: Tensor) -> Output:
        """Reconstruct activations [batch, d_in]; no token depends on its neighbours."""
        features = self.encode(x)
        return Output(self.reconstruct(x, features), features)

    def training_pass(self, x: Tensor, only_active: bool = False) -> Pass:
        """Reconstruct a batch [batch, d_in] in training; `only_active`: by sparse products, which
        give the same up to rounding."""
        pre, features = self.fire(x, only_active)
        with record_function("decode"):
            return Pass(x, self.reconstruct(x, features), features, pre)

    def fire(self, x: Tensor, only_active: bool) -> tuple[Tensor | Entries, Tensor | Entries]:
        """Pre-activations and features of a batch [batch, d_in] in training."""
        with record_function("encode"):
            if only_active:
                pre = self.active_entries(x)
                return pre, Entries(self.activate_entries(pre), pre.pattern)
            pre = self.pre_activations(x)
            return pre, self.activate_batch(pre)

    def active_entries(self, x: Tensor) -> Entries:
        """The pre-activations of a batch [batch, d_in] that have a say in anything."""
        pattern, pre = sparse.find(x, self.W_enc, self.b_enc, self.choose)
        return sparse.encode(x, self.W_enc, self.b_enc, pattern, pre)

    def choose(self, pre: Tensor) -> Tensor:
        """The places in pre-activations [rows, features] that `active_entries` takes."""
        return sparse.positive(pre)

    def bound(self) -> Tensor | float:
        """[features] what the pre-activations that `active_entries` takes exceed."""
        return 0.0

    def activate_entries(self, pre: Entries) -> Tensor:
        """Feature strengths [n entries] of the pre-activations that `active_entries` took; an
        architecture that does not define this is always computed densely."""
        raise NotImplementedError

    @property
    def knows_entries(self) -> bool:
        """Whether this architecture can be computed with active features alone."""
        return type(self).activate_entries is not SAE.activate_entries

    def density(self, this: Pass) -> float:
        """The share of [batch, features] that `active_entries` would take of this batch."""
        if isinstance(this.pre, Entries):
            return len(this.pre.pattern) / math.prod(this.pre.pattern.shape)
        few = this.pre[:SAMPLE]  # they are in random order
        return (few > self.bound()).float().mean().item()

    @torch.no_grad()
    def restart(self, which: Tensor, columns: Tensor, rows: Tensor) -> None:
        """Give features `which` [n] new encoder columns [n, d_in] and decoder rows [n, d_out]; what
        else they have is as at the start."""
        self.W_enc[:, which] = columns.T
        self.b_enc[which] = 0
        self.W_dec[which] = rows

    @torch.no_grad()
    def fix_norms(self) -> None:
        """Bring every decoder row to the norm that it started with."""
        norms = self.W_dec.norm(dim=1, keepdim=True).clamp_min(TINY)
        self.W_dec.mul_(self.config.decoder_norm / norms)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Leave of the decoder's gradient what turns rows, and nothing that stretches them
        (Bricken et al. 2023): Adam's moments then hold no part that `fix_norms` undoes."""
        gradient, rows = self.W_dec.grad, self.W_dec
        squares = rows.square().sum(dim=1, keepdim=True).clamp_min(TINY)
        along = (gradient * rows).sum(dim=1, keepdim=True) / squares
        gradient.addcmul_(along, rows, value=-1)

    @torch.no_grad()
    def fold(
        self, in_mean: Tensor, in_scale: Tensor, out_mean: Tensor, out_scale: Tensor
    ) -> dict[str, Tensor]:
        """The weights that do for raw activations what these do for normalised ones.

        With z = (x - in_mean) / in_scale for the input and x_hat = z_hat out_scale + out_mean for
        the output, both affine maps merge with the encoder and the decoder. Features stay what they
        were, and thresholds with them. Computed in float64, returned in float32, on the CPU.
        """
        in_mean, in_scale, out_mean, out_scale = (
            value.cpu().double() for value in (in_mean, in_scale, out_mean, out_scale)
        )
        weights = {name: value.cpu().double() for name, value in self.weights().items()}
        W_enc = weights["W_enc"] / in_scale
        b_dec = weights["b_dec"] * out_scale + out_mean
        folded = weights | self.biases_without(in_mean @ W_enc, weights)
        folded |= {"W_enc": W_enc, "W_dec": weights["W_dec"] * out_scale}
        if self.config.skip:
            folded["W_skip"] = weights["W_skip"] * (out_scale / in_scale)
            b_dec = b_dec - in_mean @ folded["W_skip"]
        folded["b_dec"] = b_dec
        return {name: weight.float().contiguous() for name, weight in folded.items()}

    def biases_without(self, share: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's biases if every x W_enc loses a constant `share` [features]."""
        return {"b_enc": weights["b_enc"] - share}

    def weights(self) -> dict[str, Tensor]:
        """What makes this SAE what it is, by the names of the saved format; as files want it, with
        rows that lie together."""
        return {name: value.detach().contiguous() for name, value in self.state_dict().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take what `weights` gave. RuntimeError: names or shapes differ."""
        self.load_state_dict(weights)

    def saelens(self) -> dict[str, Any]:
        """What `cfg.json` tells SAELens beyond the architecture's name."""
        return {}
