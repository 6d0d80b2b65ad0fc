"""Gives `pca` controls their directions, and limits how far soft-frozen decoder rows turn."""

import lightning as L
import torch
from torch import Tensor

from sae_lightning.llm.sites import Site
from sae_lightning.sae.controls import Control, limit_turn, list_principal_directions
from sae_lightning.sae.gated import Gated
from sae_lightning.scoring.moments import Moments
from sae_lightning.terminal import phase
from sae_lightning.training.head import Head
from sae_lightning.training.module import SAEModule

MOMENT_ROWS = 4096  # activations that are in float64 at a time


class KeepControl(L.Callback):
    """Sets the weights of `model.control=pca` heads before the first step of a new run, and turns
    soft-frozen decoder rows back after each step."""

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, module: SAEModule) -> None:
        """Give `pca` heads the principal directions of the activations from which their
        normalisation is estimated."""
        # by site and number of tokens: mean and directions
        components: dict[tuple[Site, int], tuple[Tensor, Tensor]] = {}
        for head in module.heads:
            if head.sae.config.control is not Control.pca or trainer.global_step > 0:
                continue
            tokens = head.callbacks.normalize.tokens
            key = head.source, tokens
            if key not in components:
                x = trainer.datamodule.stream.peek(tokens)[head.source].to(module.device)
                moments = measure_moments(x)
                _, axes = moments.find_principal_directions()
                components[key] = moments.mean, list_principal_directions(axes)
            set_principal_directions(head, *components[key])

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: SAEModule, *_) -> None:
        for head in module.training_heads:
            if head.sae.config.control is Control.soft_frozen_decoder:
                head.sae.W_dec.copy_(limit_turn(head.sae.W_dec, head.initial_directions))


def measure_moments(x: Tensor) -> Moments:
    """Mean [d] and covariance [d, d] of activations x [n, d], in float64."""
    moments = Moments()
    with phase("finding principal components", total=len(x)) as advance:
        for part in x.split(MOMENT_ROWS):
            moments.add(part)
            advance(len(part))
    return moments


def set_principal_directions(head: Head, mean: Tensor, directions: Tensor) -> None:
    """Make `directions` [2 d, d], of both signs, the encoder columns and decoder rows of a head.
    `mean` [d]: of raw activations. Features beyond 2 d have zero weights and never fire."""
    sae = head.sae
    rows = sae.split.slice(directions[: sae.config.features]).to(sae.W_dec)  # those of this rank
    # the mean in the head's units: 0 if its normalisation subtracts it
    centre = (mean.to(sae.b_dec) - head.in_mean) / head.in_scale
    for weight in (sae.W_dec, sae.W_enc.T):
        weight.zero_()
        weight[: len(rows)] = rows
    sae.b_enc[: len(rows)] -= rows @ centre
    if isinstance(sae, Gated):
        sae.b_mag[: len(rows)] -= rows @ centre
    sae.b_enc[len(rows) :] = -1  # below 0, so that features with zero weights never fire
    sae.b_dec.copy_(centre)
