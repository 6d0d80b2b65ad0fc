"""The base class of all sparse autoencoders.

Shapes: d_in, d_out = widths of source and target site; features = dictionary size; batch = tokens.
A tensor `features` holds strengths. A feature is a column of W_enc and a row of W_dec everywhere.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.profiler import record_function

from sae_lightning.errors import UserError
from sae_lightning.ranks import ALONE, FeatureSplit, Ranks
from sae_lightning.sae import sparse
from sae_lightning.sae.controls import FROZEN_WEIGHTS, Control
from sae_lightning.sae.initial import draw_directions
from sae_lightning.sae.matrix import DenseMatrix, Matrix, SparseMatrix
from sae_lightning.sae.sparse import SparsityPattern

SMALLEST_NORM = 1e-12  # keeps decoder rows of zeros from becoming NaN


@dataclass(slots=True, kw_only=True)
class SAEConfig:
    """Settings of the network, whatever its training objective."""

    name: str = "relu"
    """The architecture; set by the preset."""
    features: int = 10_000
    """Dictionary size (number of features); may be smaller than the site's width."""
    decoder_norm: float = 1.0
    """Norm of a decoder row at the start. At 0.1, the first updates turn all rows to the same few
    directions, and many features become near-copies."""
    start_bias: float = -1.0
    """Encoder biases at the start, in standard deviations of a pre-activation. With -1, one feature
    in 6 fires on a token at first; with 0, one in 2, and SAEs learn more slowly; with -2, one in
    44, and more features never fire."""
    fixed_norm: bool = False
    """Keep every decoder row at the norm `decoder_norm`; false lets it grow and shrink."""
    skip: bool = False
    """Add x W_skip to the reconstruction: only for a transcoder (`layer.target`)."""
    start: str | None = None
    """Start from the weights of this SAE: a run folder, or anything that analyze.py opens; null is
    a random start. Settings not given (architecture, size, site, LLM) are taken from that SAE."""
    control: Control | None = None
    """Train a control instead, an SAE that cannot learn something essential: frozen_decoder,
    soft_frozen_decoder, frozen_encoder, shuffled_activations or pca (docs/controls.md)."""
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
    """Strengths [batch, features], non-negative"""


class TrainingOutput(NamedTuple):
    """One forward pass in training: everything that objectives read."""

    x: Tensor
    """[batch, d_in]"""
    reconstruction: Tensor
    """[batch, d_out]"""
    features: Matrix
    """Strengths [batch, features], non-negative"""
    pre: Matrix
    """Pre-activations [batch, features]"""
    prefixes: tuple[Tensor, ...] = ()
    """Matryoshka: reconstruction [batch, d_out] from each dictionary but the largest; else empty"""
    relu_gate: Matrix | None = None
    """Gated: relu(gate) [batch, features]; else None"""


class SAE(nn.Module):
    """f = activate(x W_enc + b_enc);  x_hat = f W_dec + b_dec (+ x W_skip).

    A subclass is an architecture. It overrides `compute_strengths`, and `find_entries` if it needs
    more than the positive pre-activations. If the features of a token compete, it sets
    `features_compete` and overrides `activate` and `find_entries`; if those of a batch compete,
    also `activate_batch`. b_dec is not subtracted from the input: b_enc can make up for it.

    If the features are split over ranks, `features` in a shape means those of this rank; the
    reconstruction is the same on all ranks.
    """

    architecture: str
    """SAELens' name for the SAE as it is saved: "standard" for ReLU, "jumprelu" for BatchTopK."""
    features_compete = False
    """Whether a feature's activity depends on the strengths of others."""
    bytes_per_activation: int
    """Peak memory of an update, in bytes per token and feature: in mixed precision, without sparse
    products, with half of the features dead and the costliest settings of the objective."""
    per_feature = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
    """Parameters with an entry for each feature -> the dimension that runs over features."""
    biases = ("b_enc",)
    """Encoder biases and thresholds: parameters that learn `optim.bias_lr` times as fast."""

    def __init__(
        self,
        config: SAEConfig,
        d_in: int,
        d_out: int,
        generator: Generator,
        ranks: Ranks = ALONE,
    ):
        """Random decoder directions, encoder = decoder transposed (Anthropic, April 2024 update):
        pre-activations of normalised input have a standard deviation of about `decoder_norm`.
        A frozen encoder's columns have norm 1: they cannot grow, so the learned biases would soon
        outweigh shorter ones.
        """
        super().__init__()
        self.config = config
        encoder_is_frozen = "W_enc" in FROZEN_WEIGHTS.get(config.control, ())
        encoder_norm = 1.0 if encoder_is_frozen else config.decoder_norm
        self.split = FeatureSplit(config.features, ranks)
        rows = draw_directions(self.split, d_out, generator)
        rows *= config.decoder_norm / rows.norm(dim=1, keepdim=True)
        # Widths can differ in a transcoder only; its encoder directions are then drawn separately.
        columns = rows * (encoder_norm / config.decoder_norm)
        if d_in != d_out:
            columns = draw_directions(self.split, d_in, generator)
            columns *= encoder_norm / columns.norm(dim=1, keepdim=True)
        # Column-major: a feature's column is contiguous, as its decoder row is, and sparse products
        # write the gradient in this layout.
        self.W_enc = nn.Parameter(columns.T)
        bias = float(config.start_bias * encoder_norm)
        self.b_enc = nn.Parameter(torch.full((len(rows),), bias))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(d_in, d_out))
        self.add_parameters()
        for name in FROZEN_WEIGHTS.get(config.control, ()):
            getattr(self, name).requires_grad_(False)

    def add_parameters(self) -> None:
        """Add the parameters and buffers that only this architecture has."""

    @property
    def split_dims(self) -> dict[str, int]:
        """Names of the tensors of `state_dict` and `weights` that are split over ranks -> the
        dimension that runs over features; the other tensors are the same on every rank."""
        return self.per_feature | {"threshold": 0}  # of JumpReLU and BatchTopK

    def pre_activations(self, x: Tensor) -> Tensor:
        """Pre-activations [batch, features] of activations [batch, d_in]."""
        return x @ self.W_enc + self.b_enc

    def pre_activations_of(self, indices: Tensor, output: TrainingOutput) -> Tensor:
        """Pre-activations [batch, n] of the features at `indices` [n], whether or not they are
        active."""
        stored = output.pre.stored_columns(indices)
        if stored is not None:
            return stored
        # transposed first: rows of W_enc.T are contiguous
        return output.x @ self.W_enc.T[indices].T + self.b_enc[indices]

    def compute_strengths(self, pre: Matrix) -> Tensor:
        """Feature strengths of pre-activations, elementwise, in the shape of `pre.values`."""
        return pre.values.relu()

    def activate(self, pre: Tensor) -> Tensor:
        """Feature strengths [batch, features] of pre-activations, each token independently."""
        return self.compute_strengths(DenseMatrix(pre))

    def activate_batch(self, pre: Tensor) -> Tensor:
        """`activate` in training, where the features of a whole batch may compete."""
        return self.activate(pre)

    def encode(self, x: Tensor) -> Tensor:
        """Feature strengths [batch, features] of activations [batch, d_in]."""
        return self.activate(self.pre_activations(x))

    def decode(self, features: Tensor | Matrix) -> Tensor:
        """Reconstruction [batch, d_out] from strengths [batch, features], without the skip
        connection."""
        return self.split.ranks.sum(features @ self.W_dec) + self.b_dec

    def reconstruct(self, x: Tensor, features: Tensor | Matrix) -> Tensor:
        """Reconstruction [batch, d_out] from strengths and, with a skip connection, the input."""
        decoded = self.decode(features)
        return decoded + x @ self.W_skip if self.config.skip else decoded

    def forward(self, x: Tensor) -> Output:
        """Reconstruct activations [batch, d_in], each token independently."""
        features = self.encode(x)
        return Output(self.reconstruct(x, features), features)

    def training_pass(self, x: Tensor, only_active: bool = False) -> TrainingOutput:
        """Reconstruct a batch [batch, d_in] in training; `only_active`: compute sparse products,
        of active features only, which give the same result up to rounding."""
        pre, features = self.encode_batch(x, only_active)
        with record_function("decode"):
            return TrainingOutput(x, self.reconstruct(x, features), features, pre)

    def encode_batch(self, x: Tensor, only_active: bool) -> tuple[Matrix, Matrix]:
        """Pre-activations and strengths of a batch [batch, d_in] in training."""
        with record_function("encode"):
            if not only_active:
                pre = DenseMatrix(self.pre_activations(x))
                return pre, DenseMatrix(self.activate_batch(pre.values))
            with torch.no_grad():
                pattern, values = self.find_entries(x)
            # the same values, with gradients for W_enc and b_enc
            values = sparse.Encode.apply(x, self.W_enc, self.b_enc, pattern, values)
            pre = SparseMatrix(values, pattern)
            return pre, pre.with_values(self.compute_strengths(pre))

    def find_entries(self, x: Tensor) -> tuple[SparsityPattern, Tensor]:
        """Positions and values [n entries] of the pre-activations of a batch [batch, d_in] that
        affect strengths or gradients."""
        return sparse.encode_entries(x, self.W_enc, self.b_enc, sparse.find_positive)

    def entry_bound(self) -> Tensor | float:
        """Lower bound of the pre-activations that `find_entries` keeps: a number or [features]."""
        return 0.0

    def thresholds_for(self, indices: Tensor) -> Tensor | float:
        """Thresholds that the pre-activations of the features at `indices` [n] have to exceed: [n],
        or one number."""
        return 0.0

    def estimate_density(self, output: TrainingOutput) -> float:
        """Estimated share of this batch's [batch, features] that `find_entries` would keep."""
        density = output.pre.density_above(self.entry_bound())
        return self.split.ranks.average(density, len(self.split.own_features))

    @torch.no_grad()
    def restart(self, indices: Tensor, columns: Tensor, rows: Tensor) -> None:
        """Give the features at `indices` [n] new encoder columns [n, d_in] and decoder rows
        [n, d_out]. Their b_enc becomes 0, not `start_bias`; subclasses reset their parameters."""
        self.W_enc[:, indices] = columns.T
        self.b_enc[indices] = 0
        self.W_dec[indices] = rows

    @torch.no_grad()
    def fix_norms(self) -> None:
        """Rescale every decoder row to `decoder_norm`."""
        norms = self.W_dec.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
        self.W_dec.mul_(self.config.decoder_norm / norms)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Project the decoder's gradient onto the tangent space of fixed-norm rows (Bricken et al.
        2023), so that Adam's moments hold no part that `fix_norms` undoes."""
        gradient, rows = self.W_dec.grad, self.W_dec
        squares = rows.square().sum(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
        coefficients = (gradient * rows).sum(dim=1, keepdim=True) / squares
        gradient.addcmul_(coefficients, rows, value=-1)

    @torch.no_grad()
    def fold(
        self, in_mean: Tensor, in_scale: Tensor, out_mean: Tensor, out_scale: Tensor
    ) -> dict[str, Tensor]:
        """The weights, converted to read and write raw activations: z = (x - in_mean) / in_scale is
        folded into the encoder, x_hat = z_hat * out_scale + out_mean into the decoder. Computed in
        float64, returned in float32, on the CPU."""
        in_mean, in_scale, out_mean, out_scale = (
            value.cpu().double() for value in (in_mean, in_scale, out_mean, out_scale)
        )
        weights = {name: value.cpu().double() for name, value in self.weights().items()}
        W_enc = weights["W_enc"] / in_scale
        b_dec = weights["b_dec"] * out_scale + out_mean
        folded = weights | self.fold_biases(in_mean @ W_enc, weights)
        folded |= {"W_enc": W_enc, "W_dec": weights["W_dec"] * out_scale}
        if self.config.skip:
            folded["W_skip"] = weights["W_skip"] * (out_scale / in_scale)
            b_dec = b_dec - in_mean @ folded["W_skip"]
        folded["b_dec"] = b_dec
        return {name: weight.float().contiguous() for name, weight in folded.items()}

    def fold_biases(self, offset: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Encoder biases that compensate for an `offset` [features] added to x W_enc."""
        return {"b_enc": weights["b_enc"] - offset}

    def weights(self) -> dict[str, Tensor]:
        """Contiguous weights by their names in the saved format."""
        return {name: value.detach().contiguous() for name, value in self.state_dict().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Load weights as returned by `weights`; RuntimeError if names or shapes differ."""
        self.load_state_dict(weights)

    def saelens_settings(self) -> dict[str, Any]:
        """Entries of SAELens' `cfg.json` beyond the architecture's name."""
        return {}
