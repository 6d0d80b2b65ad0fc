"""The LightningModule: one or more heads that share batches, and the sum of their losses."""

import lightning as L
import torch
from torch import Tensor, nn

from sae_lightning.errors import UserError
from sae_lightning.llm.sites import Site
from sae_lightning.training.head import Head


class SAEModule(L.LightningModule):
    """Heads with independent losses: each gradient is that of the head trained alone."""

    def __init__(self, heads: list[Head], *, batch: int, steps: int):
        """`batch` tokens per update, `steps` updates in the whole run."""
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.batch, self.steps = batch, steps
        self.tokens_per_second = 0.0

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
                raise self.diverged(head, _culprit(head, batch))
            total = total + loss
        return total

    def diverged(self, head: Head, culprit: str) -> UserError:
        """The error that stops a run whose numbers are no longer finite."""
        last = head.folder / "checkpoints" / "last.ckpt"
        saved = f"the last good checkpoint is {last}" if last.exists() else "nothing was saved yet"
        return UserError(
            f"{head.name}: stopped at step {self.global_step} ({self.tokens:,} tokens): {culprit} "
            f"is not finite; {saved}. Start again with a lower optim.lr (now {head.optim.lr:g})"
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam with a parameter group per head; Adam works element by element."""
        groups = [
            {
                "params": list(head.sae.parameters()),
                "lr": head.optim.lr,
                "betas": (head.optim.beta1, head.optim.beta2),
                "eps": head.optim.eps,
            }
            for head in self.heads
        ]
        return torch.optim.Adam(groups, fused=True)


def _culprit(head: Head, batch: dict[Site, Tensor]) -> str:
    """Which part of a head's loss is not finite."""
    for site in (head.source, head.target):
        if not batch[site].isfinite().all():
            return f"the LLM's activation at {site}"
    broken = [name for name, term in head.last.terms.items() if not term.isfinite()]
    return f"the loss term {' and '.join(broken) or 'sum'}"
