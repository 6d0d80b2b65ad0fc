"""Estimates the normalisation from the first activations of a run."""

import lightning as L
import torch
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.llm.sites import Site
from sae_lightning.scoring.dominance import find_dominant_tokens
from sae_lightning.terminal import console
from sae_lightning.training.module import SAEModule
from sae_lightning.training.settings import Normalization


@torch.no_grad()
def estimate_normalization(x: Tensor, mode: Normalization) -> tuple[Tensor, Tensor]:
    """Mean [d] and scale [] of x [n, d] that give (x - mean) / scale a mean square of 1; 0 and 1
    if `mode` is none. UserError: all of x is equal to the mean, or x is not finite."""
    x = x.cpu()  # not every accelerator has float64
    mean = torch.zeros(x.shape[1], dtype=torch.float64)
    if mode is Normalization.none:
        return mean.float(), torch.ones(())
    if mode is Normalization.standardize:
        mean = x.double().mean(dim=0)
    # in parts, because a float64 copy of all of x may not fit in memory
    squares = [(part.double() - mean).square().sum() for part in x.split(4096)]
    scale = (torch.stack(squares).sum() / x.numel()).sqrt()
    if not 0 < scale.item() < float("inf"):
        raise UserError(
            f"the activations cannot be normalised: their spread over the first {len(x)} tokens "
            f"is {scale.item():g}. Try another layer.index, or llm.dtype=float32"
        )
    return mean.float(), scale.float()


def describe_outliers(site: Site, x: Tensor) -> str | None:
    """A warning if a few activations of x [n, d] with large norm dominate the variance, else
    None."""
    outliers = find_dominant_tokens(x)
    if outliers is None:
        return None
    return (
        f"{site}: the {outliers.token_count:,} largest of {len(x):,} activations hold "
        f"{outliers.share:.0%} of the variance, so normalisation and explained variance mostly "
        f"describe these; data.max_norm={outliers.max_norm:g} leaves them out"
    )


class Normalize(L.Callback):
    """Sets each head's mean and scale before the first step of a new run, from activations that
    stay in the shuffle pool for training."""

    def on_train_start(self, trainer: L.Trainer, module: SAEModule) -> None:
        """Estimate mean and scale of each head's source and target site."""
        if trainer.global_step > 0:  # they come from the checkpoint
            return
        estimates: dict[tuple, tuple[Tensor, Tensor]] = {}  # most heads of a sweep share them
        for head in module.heads:
            settings = head.callbacks.normalize
            for site, mean, scale in (
                (head.source, head.in_mean, head.in_scale),
                (head.target, head.out_mean, head.out_scale),
            ):
                key = (site, settings.mode, settings.tokens)
                if key not in estimates:
                    sample = trainer.datamodule.stream.peek(settings.tokens)
                    estimates[key] = estimate_normalization(sample[site], settings.mode)
                    if warning := describe_outliers(site, sample[site]):
                        console.print(warning)
                mean.copy_(estimates[key][0])
                scale.copy_(estimates[key][1])
            if settings.mode is Normalization.none:
                # scale `model.start_bias`, which is meant for a mean square of 1: with smaller
                # inputs few features would fire. (WarmStart then sets b_enc of loaded features.)
                x = trainer.datamodule.stream.peek(settings.tokens)[head.source]
                head.sae.b_enc.data *= x.float().square().mean().sqrt()
