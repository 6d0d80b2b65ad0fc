"""Held-out text and its activations, which only evaluation reads.

Shapes: sequences = held-out sequences, context = tokens in each, n = kept tokens, d = site width.
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sae_lightning.llm.capture import capture
from sae_lightning.llm.load import LLM
from sae_lightning.llm.placement import find_activation_device
from sae_lightning.llm.sites import Site
from sae_lightning.llm.splice import SpliceBaseline, SpliceScores, score_baseline, score_splices
from sae_lightning.llm.vocabulary import find_special_ids
from sae_lightning.ranks import ALONE, FeatureSplit, world
from sae_lightning.stream.exchange import apply_together, exchange_rows
from sae_lightning.stream.packing import HeldOutSequences, read_ids
from sae_lightning.stream.rows import compute_medians, mark_usual_rows
from sae_lightning.stream.source import HeldOutData
from sae_lightning.terminal import console, phase


class HeldOut(HeldOutData):
    """Activations of text that training never sees, and the LLM's loss on it.

    Tokens that training drops are neither scored nor replaced: position 0, special tokens, those of
    a chat that the assistant has not written (`data.assistant_only`), and those with a norm above
    `max_norm` * median (of this text) at any site. What does not depend on the SAE is computed
    once, by all ranks together.
    """

    noun = "text"

    def __init__(
        self,
        llm: LLM,
        text: HeldOutSequences,
        sites: list[Site],
        *,
        tokens: int,
        loss_tokens: int,
        batch: int,
        keep_special: bool = False,
        max_norm: float | None = None,
        own_sites: Sequence[Site] | None = None,
    ):
        """Holds `tokens` tokens, rounded up to whole sequences, or fewer if the text is short. The
        LLM's loss is measured on `loss_tokens` of these, spread evenly (0: not measured). A forward
        pass takes `batch` sequences. `own_sites`: the sites whose activations this rank keeps
        (None: all `sites`)."""
        self.own_sites = set(sites if own_sites is None else own_sites)
        self.llm, self.sites, self.batch, self.max_norm = llm, sites, batch, max_norm
        sequences = text.pick_sequences(-(-tokens // text.packing.window_size))
        self.tokens = read_ids(sequences)  # [sequences, context]
        dropped_ids = torch.tensor([] if keep_special else find_special_ids(llm.tokenizer))
        # tokens that are not trained on are negative in `sequences` (see `read_ids`)
        self._keep = ~torch.isin(self.tokens, dropped_ids) & (sequences >= 0)
        self._keep[:, 0] = False  # BOS
        count = min(len(self.tokens), -(-loss_tokens // text.packing.window_size))
        self._loss_indices = torch.linspace(0, len(self.tokens) - 1, count).round().long()
        self._rows: dict[Site, Tensor] | None = None  # {site: [n, d]}, once they are read
        self._baselines: dict[Site, SpliceBaseline] = {}

    @property
    def keep(self) -> Tensor:
        """Which tokens are scored and replaced: [sequences, context] bool."""
        self._read()
        return self._keep

    def activations(self, site: Site) -> Tensor:
        """Activations [n, d] of the kept tokens at `site`, in the LLM's dtype."""
        self._read()
        return self._rows[site]

    def prepare(self, targets: Collection[Site]) -> None:
        """Capture the activations, and measure the baselines at the `targets` of every rank."""
        self._read()
        if len(self._loss_indices):
            targets_by_rank = world().gather_values(set(targets))
            for target in sorted(set().union(*targets_by_rank)):
                self.measure_baseline(target)

    def _read(self) -> None:
        """Capture the activations once, and drop tokens of large norm from rows and `keep`."""
        if self._rows is not None:
            return
        rows = self._capture()
        if self.max_norm is not None:
            is_usual = torch.ones(int(self._keep.sum()), dtype=torch.bool)  # [n]
            if rows:  # a rank without sites has none
                is_usual = mark_usual_rows(rows, compute_medians(rows), self.max_norm).cpu()
            is_usual = torch.stack(world().gather_values(is_usual)).all(dim=0)
            # where `_keep` is true, it takes the values of `is_usual`
            self._keep = self._keep.masked_scatter(self._keep, is_usual)
            rows = {site: x[is_usual.to(x.device)] for site, x in rows.items()}
        self._rows = rows

    def _capture(self) -> dict[Site, Tensor]:
        """Capture the activations {site: [n, d]} at the sites of this rank. Rank b % size runs LLM
        batch b, and sends the rows to the ranks that need them."""
        ranks, model = world(), self.llm.model
        batches = [*zip(self.tokens.split(self.batch), self._keep.split(self.batch), strict=True)]
        rows: dict[Site, list[Tensor]] = {site: [] for site in self.sites if site in self.own_sites}
        sites_by_rank = ranks.gather_values(self.own_sites)
        width = model.config.get_text_config().hidden_size
        like = torch.empty(0, width, dtype=model.dtype, device=find_activation_device(model))
        with phase("reading held-out text", total=len(self.tokens)) as advance:
            for start in range(0, len(batches), ranks.size):
                round_batches = batches[start : start + ranks.size]
                positions = [keep.flatten().nonzero().squeeze(1) for _, keep in round_batches]
                captured = {}
                if ranks.rank < len(round_batches):
                    tokens, _ = round_batches[ranks.rank]
                    captured = capture(model, tokens, self.sites, positions[ranks.rank])
                counts = [len(indices) for indices in positions]
                for received in exchange_rows(captured, counts, sites_by_rank, like):
                    for site, x in received.items():
                        rows[site].append(x)
                advance(sum(len(tokens) for tokens, _ in round_batches))
        return {site: torch.cat(parts) for site, parts in rows.items()}

    def _select_loss_text(self) -> tuple[Tensor, Tensor]:
        """Tokens and `keep` of the sequences that the LLM's loss is measured on."""
        return self.tokens[self._loss_indices], self.keep[self._loss_indices]

    def measure_baseline(self, target: Site) -> SpliceBaseline:
        """Measure the LLM's clean loss and its loss with `target` zero- and mean-ablated. The first
        call must come from all ranks (see `prepare`)."""
        if target not in self._baselines:
            tokens, keep = self._select_loss_text()
            mean = self._compute_mean(target)
            with phase("LLM loss on held-out text", total=len(tokens)) as advance:
                baseline = score_baseline(
                    self.llm.model, tokens, target, keep, mean, self.batch, advance, world()
                )
            if not all(map(math.isfinite, baseline)):
                _report_infinite_loss(self.llm.model.dtype)
            self._baselines[target] = baseline
        return self._baselines[target]

    def _compute_mean(self, target: Site) -> Tensor:
        """Mean activation [d] at `target`, from a rank that keeps these activations."""
        mean = None
        if target in self.own_sites:
            mean = self.activations(target).cpu().double().mean(dim=0).float()
        return next(x for x in world().gather_values(mean) if x is not None)

    def measure_saes(
        self,
        source: Site,
        target: Site,
        saes: Sequence[Callable[[Tensor], Any]],
        weights: Sequence[Callable[[], dict[str, Tensor]]],
        rows_per_call: int,
        splits: Sequence[FeatureSplit] = (),
        means: Sequence[Tensor] = (),
    ) -> list[SpliceScores | None]:
        """Measure the LLM's loss with each SAE's reconstruction in place of `target`, or None for
        each SAE if no loss is measured; `weights` are not used. If the SAEs are split over ranks,
        each of these ranks runs the LLM on a part of the batches."""
        if not len(self._loss_indices):
            return [None] * len(saes)
        ranks = splits[0].ranks if splits else ALONE

        def reconstruct(sae: Callable[[Tensor], Any], x: Tensor) -> Tensor:
            return apply_together(
                lambda part: sae(part).reconstruction.to(x.device), x, rows_per_call, ranks
            )

        functions = [partial(reconstruct, sae) for sae in saes]
        baseline = self.measure_baseline(target)
        tokens, keep = self._select_loss_text()
        replaced_by = "the SAE" if len(functions) == 1 else f"{len(functions)} SAEs"
        with phase(f"LLM loss with {replaced_by}", total=len(tokens)) as advance:
            return score_splices(
                self.llm.model,
                tokens,
                source,
                target,
                functions,
                keep,
                baseline,
                self.batch,
                advance,
                ranks,
                means,
            )


def _report_infinite_loss(dtype: torch.dtype) -> None:
    """Print that the LLM's loss is not finite, why, and what to do."""
    why, remedy = "the LLM computes NaN or infinity", "set eval.loss_tokens=0, or check its weights"
    if dtype is torch.float16:
        why = "float16 overflows in the LLM above the SAE"
        remedy = "use llm.dtype=bfloat16 or float32"
    console.print(
        f"the LLM's loss on held-out text is not finite, so no score uses it: {why}; {remedy}"
    )
