"""Training curves, logged for TensorBoard."""

import lightning as L
import torch

from sae_lightning.ranks import world
from sae_lightning.scoring.metrics import compute_explained_variance
from sae_lightning.training.head import Head
from sae_lightning.training.module import SAEModule
from sae_lightning.training.schedules import is_due


@torch.no_grad()
def measure_training_scalars(head: Head) -> dict[str, float]:
    """Values of the training curves after a head's last step, by tag."""
    last, join = head.last_step, head.sae.split.join
    norms = join(head.sae.W_dec.norm(dim=1))
    scalars = {
        "train/loss": last.loss,
        **{f"train/{name}": term for name, term in last.terms.items()},
        "train/l0": last.l0,
        "train/explained_variance": compute_explained_variance(last.target, last.reconstruction),
        "train/dead": join(head.dead).float().mean(),
        "optim/grad_norm": head.grad_norm,
        "decoder/norm_mean": norms.mean(),
        "decoder/norm_max": norms.max(),
    }
    for name, coefficient in head.effective_coefficients.items():
        if hasattr(head.loss, name):  # a setting, not a constant
            scalars[f"optim/{name}"] = coefficient
    if hasattr(head.sae, "threshold"):
        scalars["sae/threshold_mean"] = join(head.sae.threshold).mean()
    return {name: float(value) for name, value in scalars.items()}


def gather_latest(module: SAEModule) -> None:
    """Collect the latest metrics of the heads of all ranks, for the progress bar."""
    heads = [head for head in module.training_heads if head.writes and head.training_metrics]
    parts = world().gather_values([head.training_metrics for head in heads])
    module.latest_metrics = [metrics for part in parts for metrics in part]


class Curves(L.Callback):
    """Logs each head's training scalars every `log_every` updates, and at the last one."""

    def __init__(self, log_every: int):
        self.log_every = log_every

    def on_train_start(self, trainer: L.Trainer, module: SAEModule) -> None:
        """Show a resumed run's last metrics until there are new ones."""
        gather_latest(module)

    def on_train_batch_end(self, trainer: L.Trainer, module: SAEModule, *_) -> None:
        step, stream = trainer.global_step, trainer.datamodule.stream
        # a batch of 1, because `log_every` counts updates, not tokens
        if not (is_due(step, 1, self.log_every) or step == module.steps):
            return
        rates: dict[int, dict[str, float]] = {}  # of each head, by tag
        for group in trainer.optimizers[0].param_groups:
            rates.setdefault(group["head"], {})[f"optim/{group['rate']}"] = group["lr"]
        data = {"data/distinct_sequences": stream.distinct_sequences, "data/epoch": stream.epoch}
        for index, head in enumerate(module.heads):
            if head.failure is None:
                head.training_metrics = measure_training_scalars(head) | rates[index] | data
                head.log.add_scalars(head.training_metrics, module.tokens_seen)
        gather_latest(module)
