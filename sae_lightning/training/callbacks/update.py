"""Callbacks that act on every update: schedules, fixed decoder norms, clipping, L0 target."""

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.profiler import record_function

from sae_lightning.training.head import Head
from sae_lightning.training.module import SAEModule
from sae_lightning.training.schedules import (
    compute_decay,
    compute_feedback,
    compute_warmup,
    measure_l0_error,
)


class Schedule(L.Callback):
    """Warm-up and decay of the learning rate, warm-up of the sparsity penalty, head by head."""

    def on_train_batch_start(self, trainer: L.Trainer, module: SAEModule, *_) -> None:
        step, steps = trainer.global_step, module.steps
        for group in trainer.optimizers[0].param_groups:
            head = module.heads[group["head"]]
            optim, factor = head.optim, compute_warmup(step, steps, head.optim.warmup)
            if head.tuned_from is not None and step >= head.tuned_from:
                factor *= head.loss.kl_lr
            group["lr"] = group["peak_lr"] * factor * compute_decay(step, steps, optim.decay)
        for head in module.heads:
            head.progress.fill_(step / steps)
            if head.loss.sparsity:
                head.penalty_factor.fill_(compute_warmup(step, steps, head.loss.warmup))


class DecoderNorm(L.Callback):
    """With `model.fixed_norm`: projects the decoder gradient onto the tangent space of fixed-norm
    rows, before it is clipped, and renormalises the rows after the step."""

    def on_before_optimizer_step(self, trainer: L.Trainer, module: SAEModule, *_) -> None:
        for head in module.training_heads:
            if head.sae.config.fixed_norm and head.sae.W_dec.grad is not None:
                head.sae.project_gradient()

    def on_train_batch_end(self, trainer: L.Trainer, module: SAEModule, *_) -> None:
        for head in module.training_heads:
            if head.sae.config.fixed_norm and head.sae.W_dec.requires_grad:
                head.sae.fix_norms()


class ClipGradient(L.Callback):
    """Clips each head's gradient to `optim.clip`, and keeps its norm before clipping in
    `head.grad_norm`.

    Lightning's own clipping takes one norm over all heads, so that a head would depend on the
    others.
    """

    def on_before_optimizer_step(self, trainer: L.Trainer, module: SAEModule, *_) -> None:
        """Clip, and freeze the heads whose loss or gradient is not finite."""
        heads = module.training_heads
        if not heads:  # all of this rank have failed; other ranks train on
            return
        with record_function("clip"):
            norms = [_clip(head) for head in heads]
            # read together: each read makes the host wait for the GPU
            sums = [norm + head.last_step.loss for head, norm in zip(heads, norms, strict=True)]
            finite = torch.stack(sums).isfinite().tolist()
        for head, norm, is_finite in zip(heads, norms, finite, strict=True):
            if is_finite:
                head.grad_norm.copy_(norm)
            else:
                module.fail(head)


def _clip(head: Head) -> Tensor:
    """Clip a head's gradient; returns its norm before clipping."""
    sae, parameters = head.sae, list(head.sae.parameters())
    # parameters that are not split count once, on rank 0
    gradients = [
        p.grad
        for name, p in sae.named_parameters()
        if p.grad is not None and (sae.split.ranks.is_rank_zero or name in sae.split_dims)
    ]
    norm = sae.split.norm(get_total_norm(gradients))
    limit = head.optim.clip
    # reading the norm is free on a CPU, and saves multiplying small gradients by 1
    if limit is not None and (norm.device.type != "cpu" or norm > limit):
        clip_grads_with_norm_(parameters, limit, norm)
    return norm


class TargetL0(L.Callback):
    """Adjusts `head.steering`, a factor of the sparsity coefficient, so that L0 approaches
    `loss.target_l0` or, in a control, the L0 of its leader.

    It starts after the penalty's warm-up, during which L0 is large at any coefficient.
    """

    def on_train_batch_end(self, trainer: L.Trainer, module: SAEModule, *_) -> None:
        for head in module.training_heads:
            target = getattr(head.loss, "target_l0", None)
            follows_leader = head.l0_target is not None
            if target is None and not follows_leader:
                continue
            buffers = [head.last_step.l0, head.l0_error, head.penalty_factor]
            if follows_leader:
                _follow_leader(head, module)
                buffers.append(head.l0_target)
            # read together: each read makes the host wait for the GPU
            l0, last_error, warmup, *leader_l0 = torch.stack(buffers).tolist()
            target = leader_l0[0] if follows_leader else target
            if warmup < 1 or target < 0:  # -1: the leader's L0 is not known yet
                continue
            error = measure_l0_error(l0, target)
            last_error = error if last_error > 1 else last_error  # above 1: there is none yet
            factor = compute_feedback(error, last_error, trainer.global_step, module.steps)
            head.steering.mul_(factor)
            head.l0_error.fill_(error)


def _follow_leader(control: Head, module: SAEModule) -> None:
    """Make the leader's L0 at this update the control's target. Both have counted L0 on the same
    batch, so that differences between batches hardly matter."""
    if control.leader is None:
        return
    trained = module.heads[control.leader]
    if trained.failure is None:
        control.l0_target.copy_(trained.last_step.l0)
