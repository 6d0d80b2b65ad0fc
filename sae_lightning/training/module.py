"""The LightningModule: one or more heads that share batches, and the sum of their losses."""

import signal
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from sae_lightning.errors import UserError
from sae_lightning.llm.sites import Site
from sae_lightning.training.head import Head
from sae_lightning.training.settings import checkpoint_path


class SAEModule(L.LightningModule):
    """Heads with independent losses: each gradient is that of the head trained alone."""

    def __init__(self, heads: list[Head], *, batch: int, steps: int, folder: Path):
        """`batch` tokens per update, `steps` updates in the whole run, kept in `folder`."""
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.batch, self.steps, self.folder = batch, steps, folder
        self.checkpoint = checkpoint_path(folder)
        self.stopped_by: signal.Signals | None = None
        self.tokens_per_second = 0.0
        self.speed: dict[str, float] = {}

    @property
    def tokens(self) -> int:
        """Training tokens seen so far."""
        return self.global_step * self.batch

    def training_step(self, batch: dict[Site, Tensor], _: int) -> Tensor:
        """The sum of the heads' losses on a batch {site: [batch, d_site]}."""
        total = torch.zeros((), device=self.device)
        for head in self.heads:
            loss = head(batch)
            if not loss.isfinite():
                raise self.diverged(head, *_culprit(head, batch))
            total = total + loss
        return total

    def diverged(self, head: Head, culprit: str, remedy: str = "") -> UserError:
        """The error that stops a run whose numbers are no longer finite."""
        saved = "nothing was saved yet"
        if self.checkpoint.exists():
            saved = f"the last good checkpoint is {self.checkpoint}"
        which = f"{head.name}: " if len(self.heads) > 1 else ""
        remedy = remedy or f"a lower optim.lr (now {head.optim.lr:g})"
        return UserError(
            f"{which}stopped at step {self.global_step} ({self.tokens:,} tokens): {culprit} is not "
            f"finite; {saved}. Start again with {remedy}"
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam for all heads: it works element by element, so they do not notice each other.

        Each head has a group of weights and one of its encoder bias, which learns faster.
        """
        groups = []
        for number, head in enumerate(self.heads):
            optim, bias = head.optim, head.sae.b_enc
            factor = optim.bias_lr or head.sae.W_enc.shape[0] ** 0.5
            weights = [p for p in head.sae.parameters() if p is not bias]
            for name, parameters, rate in (
                ("lr", weights, optim.lr),
                ("bias_lr", [bias], optim.lr * factor),
            ):
                groups.append(
                    {
                        "params": parameters,
                        "lr": rate,
                        "peak_lr": rate,
                        "head": number,
                        "rate": name,
                        "betas": (optim.beta1, optim.beta2),
                        "eps": optim.eps,
                    }
                )
        return torch.optim.Adam(groups, fused=True)


def _culprit(head: Head, batch: dict[Site, Tensor]) -> tuple[str, ...]:
    """Which part of a head's loss is not finite, and a remedy if it is not the learning rate."""
    for site in (head.source, head.target):
        if not batch[site].isfinite().all():
            return f"the LLM's activation at {site}", "llm.dtype=float32"
    broken = [name for name, term in head.last.terms.items() if not term.isfinite()]
    return (f"the loss term {' and '.join(broken) or 'sum'}",)
