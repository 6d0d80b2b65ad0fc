"""The LightningModule: one or more heads that share batches, each with its own loss."""

import signal
from collections.abc import Collection, Sequence
from time import perf_counter

import lightning as L
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from sae_lightning.errors import UserError
from sae_lightning.files import write_json
from sae_lightning.llm.sites import Site
from sae_lightning.llm.spliced_kl import CleanRun
from sae_lightning.stream.tuning_text import TuningText
from sae_lightning.training.adam import Adam
from sae_lightning.training.head import Head
from sae_lightning.training.settings import ResampleConfig, locate_checkpoint, locate_failure


class SAEModule(L.LightningModule):
    """Heads with independent losses: each gets the gradient that it would get alone."""

    def __init__(
        self,
        heads: list[Head],
        *,
        batch: int,
        steps: int,
        heads_in_pass: int | None = None,
        resampling: Sequence[ResampleConfig] | None = None,
        resume: str = "",
        starts_warm: bool = False,
        tuning_text: TuningText | None = None,
        tuning_starts: Collection[int] = (),
    ):
        """`batch`: tokens per update; `steps`: updates in the whole run; `heads_in_pass`: number of
        heads on all ranks (None: of `heads`); `resampling`: settings of the heads on all ranks
        (None: of `heads`); `resume`: the command that continues the run; `starts_warm`: whether any
        head on any rank starts from a saved SAE; `tuning_text`: the text for `loss.kl`;
        `tuning_starts`: the updates at which `loss.kl` begins, for any head on any rank."""
        super().__init__()
        # manual, so that memory holds the activations of one head at a time
        self.automatic_optimization = False
        self.heads = nn.ModuleList(heads)
        self.batch, self.steps, self.resume = batch, steps, resume
        self.starts_warm, self.tuning_starts = starts_warm, tuning_starts
        self.tuning_text, self.tuning_seconds = tuning_text, 0.0
        self.heads_in_pass = heads_in_pass or len(heads)
        self.resampling = resampling or [head.callbacks.resample for head in heads]
        self.last_batch: dict[Site, Tensor] = {}
        self.received_signal: signal.Signals | None = None  # the signal that this rank got
        self.stopped_by: signal.Signals | None = None  # the signal that rank 0 got, on all ranks
        # the last points of the training curves, for the heads of all ranks
        self.latest_metrics: list[dict[str, float]] = []
        self.tokens_per_second = 0.0
        self.speed: dict[str, float] = {}  # tokens per second and shares of time

    @property
    def tokens_seen(self) -> int:
        """Training tokens seen so far."""
        return self.global_step * self.batch

    @property
    def training_heads(self) -> list[Head]:
        """The heads that have not failed."""
        return [head for head in self.heads if head.failure is None]

    def training_step(self, batch: dict[Site, Tensor], _: int) -> None:
        """Update every head that has not failed, with one batch {site: [batch, d_site]}."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.last_batch = batch
        clean: dict[int, list[CleanRun]] = {}
        for head in self.training_heads:
            tuned = head.tuned_from is not None and self.global_step >= head.tuned_from
            loss = head(batch, tuned)
            with torch.autocast(self.device.type, enabled=False), record_function("backward"):
                self.manual_backward(loss)
                del loss  # frees the graph before the next head, or the LLM, builds its own
                if tuned:
                    self._add_kl(head, clean)
        optimizer.step()

    def _add_kl(self, head: Head, clean: dict[int, list[CleanRun]]) -> None:
        """Add the gradient of a head's `loss.kl`. `clean` caches this update's runs of the LLM
        without an SAE for heads with the same `tuned_from`, which use the same text."""
        started, first_update = perf_counter(), head.tuned_from
        if first_update not in clean:
            clean[first_update] = self.tuning_text.run_update(
                first_update, self.global_step, self.batch
            )
        self.manual_backward(head.tune(self.tuning_text.llm.model, clean[first_update]))
        self.tuning_seconds += perf_counter() - started

    def fail(self, head: Head) -> None:
        """Freeze a head whose loss or gradient is not finite and write the reason to its folder;
        the others train on. UserError if it is the only one of the pass."""
        culprit, remedy = _find_culprit(head, self.last_batch)
        saved, checkpoint = "nothing was saved yet", locate_checkpoint(head.folder)
        if checkpoint.exists():
            saved = f"the last good checkpoint is {checkpoint}"
        head.failure = (
            f"stopped at step {self.global_step} ({self.tokens_seen:,} tokens): {culprit} is not "
            f"finite; {saved}. Start again with {remedy}"
        )
        head.sae.zero_grad()  # from now on Adam skips its parameters, which have no gradient
        if head.writes:
            write_json(locate_failure(head.folder), {"reason": head.failure, "diverged": True})
        if self.heads_in_pass == 1:
            raise UserError(head.failure)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam for all heads, because Adam is elementwise. Each head has two parameter groups:
        weights, and biases and thresholds, which have their own learning rate."""
        groups = []
        for index, head in enumerate(self.heads):
            optim = head.optim
            factor = optim.bias_lr or head.sae.W_enc.shape[0] ** 0.5
            parameters = dict(head.sae.named_parameters())
            curves = {"lr": optim.lr, "bias_lr": optim.lr * factor}  # curve -> peak rate
            for (curve, lr), names in zip(curves.items(), head.group_parameters(), strict=True):
                groups.append(
                    {
                        "params": [parameters[name] for name in names],
                        "lr": lr,
                        "peak_lr": lr,
                        "head": index,
                        "rate": curve,  # name of its curve
                        "betas": (optim.beta1, optim.beta2),
                        "eps": optim.eps,
                    }
                )
        return Adam(groups)


def _find_culprit(head: Head, batch: dict[Site, Tensor]) -> tuple[str, str]:
    """Name what is not finite in a head's update, and the setting that may prevent it."""
    for site in (head.source, head.target):
        if not batch[site].isfinite().all():
            return f"the LLM's activation at {site}", "llm.dtype=float32"
    terms, remedy = head.last_step.terms, f"a lower optim.lr (now {head.optim.lr:g})"
    broken = [name for name, term in terms.items() if not term.isfinite()]
    if broken:
        return f"the loss term {' and '.join(broken)}", remedy
    for name, coefficient in head.effective_coefficients.items():
        is_large = not coefficient * terms[name] < 1e6 * terms["mse"]  # also NaN (0 * infinity)
        if is_large and hasattr(head.loss, name):  # a setting, not a constant
            remedy = f"a lower loss.{name} (now {getattr(head.loss, name):g})"
    return "the gradient" if head.last_step.loss.isfinite() else "the loss term sum", remedy
