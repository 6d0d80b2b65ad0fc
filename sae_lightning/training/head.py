"""A head: one SAE in training, with all of its state.

Shapes: batch = tokens, d_in and d_out = widths of the source and target site.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize
from torch.profiler import record_function

from sae_lightning.errors import UserError
from sae_lightning.llm.sites import Site
from sae_lightning.llm.spliced_kl import CleanRun, measure_spliced_kl
from sae_lightning.sae import SAE, Loss, Output, TrainingStatus
from sae_lightning.sae.controls import Control, permute_dimensions
from sae_lightning.sae.matrix import Matrix
from sae_lightning.sae.products import break_even_density
from sae_lightning.sae.sparse import pick_working_dtype
from sae_lightning.training.logging import HeadLog
from sae_lightning.training.settings import CallbacksConfig, OptimConfig, Products

SMALLEST_KL = 1e-8  # added to the KL before dividing by it


class StepResult(NamedTuple):
    """Results of one training step, detached, for callbacks."""

    loss: Tensor
    """Weighted sum of the terms"""
    terms: dict[str, Tensor]
    """Unweighted, by name"""
    l0: Tensor
    """Mean number of active features per token"""
    target: Tensor
    """[batch, d_out], normalised"""
    reconstruction: Tensor
    """[batch, d_out], normalised"""


class Head(nn.Module):
    """An SAE in training: its objective, its source and target sites, and its state."""

    settings: dict[str, Any]
    """Settings of the run that must not change on resuming, by dotted name."""
    metadata: dict[str, Any]
    """Metadata of the saved SAE, under SAELens' keys and ours."""
    log: HeadLog

    def __init__(
        self,
        sae: SAE,
        *,
        name: str,
        folder: Path,
        source: Site,
        target: Site,
        loss: Loss,
        optim: OptimConfig,
        callbacks: CallbacksConfig,
        dead_window: int,
        seed: int,
        products: Products = Products.auto,
    ):
        super().__init__()
        self.sae, self.loss, self.optim, self.callbacks = sae, loss, optim, callbacks
        self.name, self.folder, self.source, self.target = name, folder, source, target
        self.dead_window, self.products = dead_window, products
        self.start: str | None = None  # address of the SAE to start from; None if resumed
        self.start_metrics: dict[str, float] = {}  # held-out metrics of that SAE
        self.tuned_from: int | None = None  # the first update with `loss.kl`; None without it
        self.before_kl: dict[str, float] = {}  # held-out metrics before that update
        self.adam_steps = 0  # updates that Adam's state already had at a warm start; else 0
        self.fates: dict[str, int] = {}  # features that stayed, died, ... (`count_fates`)
        self.last_step: StepResult | None = None  # None before the first update
        self.training_metrics: dict[str, float] = {}  # the last points of the training curves
        # results of the last evaluation; empty before the first
        self.held_out_metrics: dict[str, float] = {}
        self.density: Tensor | None = None  # share of tokens on which each feature fires [features]
        self.density_counts: dict[str, int] = {}  # number of features by density
        self.failure: str | None = None  # why the head is frozen; None while it trains
        self.writes = True  # whether this rank writes the head's files
        self.leader: int | None = None  # index of the head whose L0 a control follows
        # share of [batch, features] that sparse products compute, at the last update; at first 1
        self.active_density = 1.0
        self._register_state(seed)

    def _register_state(self, seed: int) -> None:
        """Register the tensors that evolve in training as buffers."""
        sae = self.sae
        features, d_out = sae.W_dec.shape
        self.register_buffer("in_mean", torch.zeros(sae.W_enc.shape[0]))
        self.register_buffer("in_scale", torch.ones(()))
        self.register_buffer("out_mean", torch.zeros(d_out))
        self.register_buffer("out_scale", torch.ones(()))
        self.register_buffer("progress", torch.zeros(()))  # share of the run completed
        # factors of the sparsity coefficient, set by its warm-up and by `TargetL0`
        self.register_buffer("penalty_factor", torch.ones(()))
        self.register_buffer("steering", torch.ones(()))  # product of all `compute_feedback`
        # `measure_l0_error` at the last update, in [-1, 1]; 2 means none yet
        self.register_buffer("l0_error", torch.tensor(2.0))
        self.register_buffer("tokens_since_fired", torch.zeros(features, dtype=torch.int64))
        self.register_buffer("grad_norm", torch.zeros(()))
        if sae.config.start:
            # decoder directions of the SAE to start from (0 for features that it lacks), and
            # whether a feature fired before the first update
            self.register_buffer("start_rows", torch.zeros(features, d_out, dtype=torch.float16))
            self.register_buffer("start_fired", torch.zeros(features, dtype=torch.uint8))
        # the last known L0 of the trained SAE that a control follows; -1 means none yet
        can_follow = sae.config.control is not None and self.loss.fixes_coefficient
        self.register_buffer("l0_target", torch.tensor(-1.0) if can_follow else None)
        if sae.config.control is Control.soft_frozen_decoder:
            # not in checkpoints: the seed makes them again
            directions = normalize(sae.W_dec.detach())
            self.register_buffer("initial_directions", directions, persistent=False)
        # each head has its own RNG, so that training heads together changes no random number
        generator_state = Generator().manual_seed(seed).get_state()
        self.register_buffer("generator_state", generator_state)

    def normalise(self, batch: dict[Site, Tensor]) -> tuple[Tensor, Tensor]:
        """Normalise input [batch, d_in] and target [batch, d_out] by the head's mean and scale."""
        x = (batch[self.source].float() - self.in_mean) / self.in_scale
        if self.target == self.source:
            return x, x
        return x, (batch[self.target].float() - self.out_mean) / self.out_scale

    def use_sparse_products(self, x: Tensor) -> bool:
        """Whether to compute the update on `x` [batch, d_in] with sparse products."""
        # 0 on a device without sparse products
        limit = break_even_density(x.device.type, pick_working_dtype(x))
        if self.products is Products.sparse:
            return limit > 0
        return self.products is Products.auto and self.active_density < limit

    def forward(self, batch: dict[Site, Tensor], tuned: bool = False) -> Tensor:
        """Training loss [] of a batch {site: [batch, d_site]} of raw activations; in an update with
        `loss.kl` (`tuned`), without the KL, which `tune` computes."""
        x, target = self.normalise(batch)
        if self.sae.config.control is Control.shuffled_activations:
            x = target = self._shuffle(x)
        output = self.sae.training_pass(x, self.use_sparse_products(x))
        status = TrainingStatus(self.dead, self.progress)
        with record_function("loss"):
            terms = self.loss.terms(self.sae, output, target, status)
        loss = terms["mse"] / (1 + self.loss.kl) if tuned else terms["mse"]
        for name, coefficient in self.effective_coefficients.items():
            loss = loss + coefficient * terms[name]
        l0 = self._count_firing(output.features)
        limit = break_even_density(x.device.type, pick_working_dtype(x))
        if self.products is Products.auto and limit:  # for `use_sparse_products` at the next update
            self.active_density = self.sae.estimate_density(output)
        self.last_step = StepResult(
            loss.detach(),
            {name: term.detach() for name, term in terms.items()},
            l0,
            target,
            output.reconstruction.detach(),
        )
        return loss

    def tune(self, llm: nn.Module, runs: Sequence[CleanRun]) -> Tensor:
        """The term of the loss [] that `loss.kl` = kl adds: kl / (1 + kl) * (mse' / KL') * KL, with
        mse' and KL' without gradients. Call it after `forward`. `runs`: the LLM's forward passes
        without an SAE on the text of this update. The SAE runs as in evaluation: in float32, and a
        BatchTopK SAE with its threshold."""
        sites, ranks = (self.source, self.target), self.sae.split.ranks
        kl = measure_spliced_kl(llm, runs, *sites, lambda x: self.run_raw(x).reconstruction, ranks)
        result, weight = self.last_step, self.loss.kl
        loss = weight / (1 + weight) * result.terms["mse"] / (kl.detach() + SMALLEST_KL) * kl
        self.last_step = result._replace(
            loss=result.loss + loss.detach(), terms=result.terms | {"kl": kl.detach()}
        )
        return loss

    def _shuffle(self, x: Tensor) -> Tensor:
        """`permute_dimensions` of x [batch, d_in] with the head's own RNG."""
        generator = Generator()
        generator.set_state(self.generator_state.cpu())
        shuffled = permute_dimensions(x, generator)
        self.generator_state.copy_(generator.get_state())
        return shuffled

    @property
    def effective_coefficients(self) -> dict[str, float | Tensor]:
        """Coefficient of each term but the mse, with the factors of warm-up and `TargetL0`."""
        values = self.loss.coefficients()
        if self.loss.sparsity:
            values[self.loss.sparsity] *= self.penalty_factor * self.steering
        return values

    @torch.no_grad()
    def _count_firing(self, features: Matrix) -> Tensor:
        """Update `tokens_since_fired`; returns the mean number of active features per token."""
        counts = features.count_positive()  # tokens on which each feature fires
        silent = self.tokens_since_fired + features.batch_size
        self.tokens_since_fired.copy_(silent.masked_fill(counts > 0, 0))
        return self.sae.split.ranks.sum(counts.sum()) / features.batch_size

    @property
    def dead(self) -> Tensor:
        """[features] bool: silent for at least `dead_window` tokens."""
        return self.tokens_since_fired >= self.dead_window

    @torch.no_grad()
    def reconstruct_raw(self, x: Tensor) -> Output:
        """Reconstruct raw activations [batch, d_in] as [batch, d_out], both in the LLM's units."""
        return self.run_raw(x)

    def run_raw(self, x: Tensor) -> Output:
        """Like `reconstruct_raw`, but with gradients."""
        x = x.to(self.in_mean.device, torch.float32)
        output = self.sae((x - self.in_mean) / self.in_scale)
        return Output(output.reconstruction * self.out_scale + self.out_mean, output.features)

    def get_extra_state(self) -> dict[str, Any]:
        """State for checkpoints that is not a tensor; `set_extra_state` restores it."""
        # "occupied": the saved name of active_density
        state = {"training_metrics": self.training_metrics, "occupied": self.active_density}
        if self.sae.config.start:
            state |= {"start_metrics": self.start_metrics, "adam_steps": self.adam_steps}
        if self.tuned_from is not None:
            state |= {"before_kl": self.before_kl}
        return state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint. UserError if an earlier version made the checkpoint,
        whose moments of Adam then have another memory layout."""
        if "occupied" not in state:
            raise UserError(
                f"resume={self.folder}: an earlier version of sae_lightning made this checkpoint; "
                "resume it with that version, or start a new run"
            )
        self.training_metrics, self.active_density = state["training_metrics"], state["occupied"]
        self.start_metrics = state.get("start_metrics", {})
        self.adam_steps = state.get("adam_steps", 0)
        self.before_kl = state.get("before_kl", {})

    def group_parameters(self) -> tuple[list[str], list[str]]:
        """Names of the parameters in Adam's two groups, in order: weights (all parameters but
        `SAE.biases`, without those that a control freezes), and biases."""
        biases, parameters = list(self.sae.biases), self.sae.named_parameters()
        return [n for n, p in parameters if n not in biases and p.requires_grad], biases

    def fold_weights(self) -> dict[str, Tensor]:
        """Fold the normalisation into the SAE's weights, so that they take raw activations."""
        return self.sae.fold(self.in_mean, self.in_scale, self.out_mean, self.out_scale)
