"""Held-out text and its activations: the only thing that evaluation reads.

Shapes: sequences = held-out sequences, context = tokens each, n = kept tokens, d = site width.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from sae_lightning.llm.capture import capture
from sae_lightning.llm.load import LLM, special_ids
from sae_lightning.llm.sites import Site
from sae_lightning.llm.splice import Baseline, Scores, baseline, score
from sae_lightning.stream.tokens import HeldOutTokens
from sae_lightning.terminal import phase


class HeldOut:
    """Activations of text that training never sees, and the LLM's loss on it.

    Position 0 and special tokens are left out, as in training, and stay untouched in every
    intervention. What does not depend on the SAE is computed once.
    """

    def __init__(
        self,
        llm: LLM,
        text: HeldOutTokens,
        sites: list[Site],
        *,
        tokens: int,
        loss_tokens: int,
        batch: int,
        keep_special: bool = False,
    ):
        """At least `tokens` tokens in whole sequences, and `loss_tokens` of them, spread evenly,
        for the LLM's loss; `batch` sequences a forward pass."""
        self.llm, self.sites, self.batch = llm, sites, batch
        self.tokens = text.take(-(-tokens // text.packing.width))  # [sequences, context]
        dropped = torch.tensor([] if keep_special else special_ids(llm.tokenizer))
        self.keep = ~torch.isin(self.tokens, dropped)
        self.keep[:, 0] = False
        count = min(len(self.tokens), -(-loss_tokens // text.packing.width))
        places = torch.linspace(0, len(self.tokens) - 1, count).round().long()
        self._loss_text = self.tokens[places], self.keep[places]
        self.activations = lru_cache(maxsize=None)(self._activations)
        self.baseline = lru_cache(maxsize=None)(self._baseline)

    def _captured(self) -> dict[Site, Tensor]:
        batches = zip(self.tokens.split(self.batch), self.keep.split(self.batch), strict=True)
        rows: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        with phase("reading held-out text", total=len(self.tokens)) as advance:
            for tokens, keep in batches:
                for site, activation in capture(self.llm.model, tokens, self.sites).items():
                    rows[site].append(activation[keep.to(activation.device)])
                advance(len(tokens))
        return {site: torch.cat(parts) for site, parts in rows.items()}

    def _activations(self, site: Site) -> Tensor:
        """Activations [n, d] of the kept tokens at `site`, in the LLM's dtype."""
        if not hasattr(self, "_rows"):
            self._rows = self._captured()
        return self._rows[site]

    def mean(self, site: Site) -> Tensor:
        """Mean activation [d] at `site` over the held-out text."""
        return self.activations(site).cpu().double().mean(dim=0).float()

    def _baseline(self, site: Site) -> Baseline:
        """The LLM's loss as it is, and with `site` zero- and mean-ablated."""
        tokens, keep = self._loss_text
        with phase("LLM loss on held-out text", total=len(tokens)) as advance:
            return baseline(
                self.llm.model, tokens, site, keep, self.mean(site), self.batch, advance
            )

    def scores(self, site: Site, function: Callable[[Tensor], Tensor]) -> Scores:
        """The LLM's loss with `function` [n, d] -> [n, d] in place of `site`."""
        known = self.baseline(site)
        tokens, keep = self._loss_text
        with phase("LLM loss with the SAE", total=len(tokens)) as advance:
            mean = self.mean(site)
            return score(
                self.llm.model, tokens, site, function, keep, mean, self.batch, advance, known
            )
