"""Evaluation of each head on held-out data during training."""

from collections.abc import Sequence
from itertools import groupby

import lightning as L

from sae_lightning.scoring.metrics import count_by_density
from sae_lightning.scoring.scorecard import Scorecard, score_saes
from sae_lightning.stream.source import HeldOutData
from sae_lightning.training.head import Head
from sae_lightning.training.module import SAEModule
from sae_lightning.training.schedules import is_due
from sae_lightning.training.warm_start import count_fates


def evaluate_heads(heads: Sequence[Head], held_out: HeldOutData, tokens: int) -> None:
    """Score this rank's heads after `tokens` training tokens, heads of the same sites together; the
    results go to each head's log and `held_out_metrics`. All ranks first score the heads that are
    split over them."""
    held_out.prepare({head.target for head in heads})

    def make_key(head: Head) -> tuple:  # split heads come first, as False < True
        return head.sae.split.ranks.size == 1, head.source, head.target

    for (_, source, target), same_sites in groupby(sorted(heads, key=make_key), key=make_key):
        group = list(same_sites)
        functions = [head.reconstruct_raw for head in group]
        weight_functions = [head.fold_weights for head in group]
        decoders = [head.sae.W_dec for head in group]
        splits = [head.sae.split for head in group]
        cards = score_saes(
            functions, decoders, held_out, source, target, weight_functions, splits=splits
        )
        for head, card in zip(group, cards, strict=True):
            _record_scores(head, card, tokens)


def _record_scores(head: Head, card: Scorecard, tokens: int) -> None:
    """Keep a head's scores in the head and write them to its log."""
    head.held_out_metrics = card.scalars()
    head.density = card.quality.density
    head.density_counts = count_by_density(card.quality.density)
    norms = head.sae.split.join(head.sae.W_dec.detach().norm(dim=1))
    head.log.add_scalars({f"held_out/{k}": v for k, v in head.held_out_metrics.items()}, tokens)
    if head.sae.config.start:
        fires = card.quality.density > 0
        if tokens == 0:  # the evaluation before the first update
            head.start_metrics = head.held_out_metrics
            is_in_start = head.start_rows.any(dim=1)  # False for features that only the head has
            head.start_fired.copy_(head.sae.split.slice(fires.to(is_in_start.device)) & is_in_start)
        head.fates = count_fates(head, fires)
        head.log.add_scalars({f"start/{name}": n for name, n in head.fates.items()}, tokens)
    head.log.add_density(card.quality.density, tokens)
    head.log.add_histogram("decoder/norm", norms, tokens)
    head.log.flush()


class Evaluate(L.Callback):
    """Evaluates warm-started SAEs before the first update, all SAEs every `every` training tokens,
    and each SAE before its fine-tuning with `loss.kl`; `runs/run.py` evaluates once more at the
    end."""

    def __init__(self, every: int):
        self.every = every

    def on_train_start(self, trainer: L.Trainer, module: SAEModule) -> None:
        """Evaluate the heads of a new run that start from a saved SAE or begin with `loss.kl`; all
        ranks take part if any rank has one."""
        if trainer.global_step == 0 and (module.starts_warm or 0 in module.tuning_starts):
            heads = [head for head in module.heads if head.start or head.tuned_from == 0]
            self._evaluate(heads, trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: SAEModule, *_) -> None:
        step = trainer.global_step
        heads, due = module.training_heads, is_due(step, module.batch, self.every)
        if step < module.steps and (due or step in module.tuning_starts):
            about_to_tune = [head for head in heads if head.tuned_from == step]
            self._evaluate(heads if due else about_to_tune, trainer, module)

    def _evaluate(self, heads: Sequence[Head], trainer: L.Trainer, module: SAEModule) -> None:
        """Evaluate `heads`; those that begin fine-tuning now keep the scores as `before_kl`."""
        evaluate_heads(heads, trainer.datamodule.held_out, module.tokens_seen)
        for head in heads:
            if head.tuned_from == trainer.global_step:
                head.before_kl = head.held_out_metrics
