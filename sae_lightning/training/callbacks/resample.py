"""Resampling of dead features (Bricken et al. 2023, "Neuron resampling")."""

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import Optimizer

from sae_lightning.ranks import Ranks
from sae_lightning.training.head import Head
from sae_lightning.training.module import SAEModule
from sae_lightning.training.schedules import is_due
from sae_lightning.training.settings import ResampleConfig


@torch.no_grad()
def resample(head: Head, optimizer: Optimizer, x: Tensor, target: Tensor) -> int:
    """Restart the dead features of `head`, unless all are dead or `x` is empty; returns the number
    restarted on all ranks.

    For each dead feature, a token is drawn with probability proportional to the square of its loss.
    The encoder column gets the direction of the token's normalised input (`x` [n, d_in]), the
    decoder row that of its target (`target` [n, d_out]). The row gets the mean norm of the rows of
    live features, the column 0.2 times the mean norm of their columns. The feature's other
    parameters are reset, and its moments in Adam's state become 0.
    """
    sae, split = head.sae, head.sae.split
    all_dead = split.join(head.dead)
    count = int(all_dead.sum())
    if not count or count == len(all_dead) or not len(x):
        return 0
    loss = (sae(x).reconstruction.float() - target).square().sum(dim=1)
    generator = torch.Generator()
    generator.set_state(head.generator_state.cpu())
    weights = loss.cpu().double().square()
    # a token is drawn twice only if there are fewer tokens than dead features
    tokens = torch.multinomial(weights, count, replacement=count > len(x), generator=generator)
    head.generator_state.copy_(generator.get_state())

    # this rank's features only, while `all_dead` covers those of all ranks
    alive, dead = ~head.dead, head.dead.nonzero().squeeze(1)
    # the i-th dead feature of all ranks takes token i
    places = split.slice(all_dead.cumsum(0) - 1)[dead]
    drawn = tokens.to(x.device)[places]
    decoder_norm = _average(sae.W_dec[alive].norm(dim=1), split.ranks)
    encoder_norm = _average(sae.W_enc[:, alive].norm(dim=0), split.ranks)
    columns, rows = normalize(x[drawn]) * 0.2 * encoder_norm, normalize(target[drawn])
    sae.restart(dead, columns, rows * decoder_norm)
    for name, dim in sae.per_feature.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[getattr(sae, name)][moment].index_fill_(dim, dead, 0)
    head.tokens_since_fired[dead] = 0
    return count


def _average(values: Tensor, ranks: Ranks) -> float:
    return ranks.average(values.mean().item(), len(values))


class Resample(L.Callback):
    """Resamples dead features every `callbacks.resample.every` tokens."""

    def on_train_batch_end(self, trainer: L.Trainer, module: SAEModule, *_) -> None:
        stream = trainer.datamodule.stream
        if any(_is_due(settings, module) for settings in module.resampling):
            stream.peek(1)  # fills the pools, for which all ranks are needed
        for head in module.training_heads:
            settings = head.callbacks.resample
            if not _is_due(settings, module):
                continue
            sample = stream.peek(settings.tokens)
            sample = {site: rows.to(module.device) for site, rows in sample.items()}
            count = resample(head, trainer.optimizers[0], *head.normalise(sample))
            head.log.add_scalars({"train/resampled": count}, module.tokens_seen)


def _is_due(settings: ResampleConfig, module: SAEModule) -> bool:
    """Whether features are resampled after this update."""
    step = module.global_step
    # after the last update the pool is empty
    if settings.every is None or step > min(settings.until * module.steps, module.steps - 1):
        return False
    return is_due(step, module.batch, settings.every)
