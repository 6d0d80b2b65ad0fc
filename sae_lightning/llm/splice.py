"""Replacing activations inside the language model, and what that costs its predictions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_lightning.llm.logits import body, logits
from sae_lightning.llm.sites import Site, hook

HEAD = 256  # positions whose logits are there at a time
# Of these, positions in float32 at a time. On a CPU 32 rows of 50,000 stay in its cache, six times
# as fast as 256; a GPU wants fewer and larger pieces.
ROWS = {"cpu": 32, "other": 128}

Function = Callable[[Tensor], Tensor]
Advance = Callable[[int], None]


class Baseline(NamedTuple):
    """Cross-entropies that do not depend on the function under test (nats per token)."""

    ce_clean: float
    """The model as it is."""

    ce_zero: float
    """The target set to zero."""

    ce_mean: float
    """The target set to its mean activation."""


class Scores(NamedTuple):
    """What replacing the target costs the model's next-token predictions (nats per token)."""

    ce_clean: float
    """Cross-entropy of the model as it is."""

    ce_spliced: float
    """Cross-entropy with the target replaced by function(source)."""

    ce_zero: float
    """Cross-entropy with the target set to zero."""

    ce_mean: float
    """Cross-entropy with the target set to its mean activation."""

    ce_recovered: float
    """(ce_zero - ce_spliced) / (ce_zero - ce_clean): 1 is lossless, 0 as bad as zero ablation;
    nan where zero ablation changes nothing."""

    kl: float
    """Mean KL(clean || spliced) of the next-token distributions."""


@contextmanager
def replaced(
    model: nn.Module, source: Site, target: Site, function: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[nn.Module]:
    """Inside the block, `model` runs with function(x, y) in place of y, its activation at `target`.

    x: that at `source`, which the model computes before `target` or which is the same site. Both
    as `hook` gives them; function returns the shape of y.
    """
    read: list[Tensor] = []

    def replace(y: Tensor) -> Tensor:
        return function(read.pop(), y).to(y.dtype)

    hooks = []
    try:
        # A copy, because Falcon adds the attention's output into the MLP's.
        hooks.append(hook(model, source, lambda x: read.append(x.clone())))
        hooks.append(hook(model, target, replace))
        yield model
    finally:
        for each in hooks:
            each.remove()


def baseline(
    model: nn.Module,
    tokens: Tensor,
    target: Site,
    keep: Tensor,
    mean: Tensor,
    batch: int,
    advance: Advance | None = None,
) -> Baseline:
    """Cross-entropies that hold for every function: compute them once, pass them to `score`.

    tokens, keep, batch, advance: as in `score`; mean: [d_out], what mean ablation puts in place.
    """
    ablations = [torch.zeros_like, lambda y: mean.to(y).expand_as(y)]
    clean, (zero, mean_ablated), _ = _means(
        model, tokens, target, target, ablations, keep, batch, advance
    )
    return Baseline(ce_clean=clean, ce_zero=zero, ce_mean=mean_ablated)


def score(
    model: nn.Module,
    tokens: Tensor,
    source: Site,
    target: Site,
    functions: Sequence[Function],
    keep: Tensor,
    baseline: Baseline,
    batch: int,
    advance: Advance | None = None,
) -> list[Scores]:
    """Cross-entropy and KL of the model with each function of `source` in place of `target`.

    tokens, keep (bool): [sequences, context]; functions: float32 [n, d_in] -> [n, d_out];
    baseline: of the same tokens and keep; batch: sequences per forward pass; advance is called
    with the sequences just done. The clean model runs once for all functions.
    Only positions in `keep` are replaced, in the ablations too: an SAE never sees BOS and other
    special tokens. The scores are means over the predictions of kept tokens.
    """
    clean, ce, kl = _means(
        model, tokens, source, target, functions, keep, batch, advance, with_kl=True
    )
    zero = baseline.ce_zero
    return [
        Scores(
            ce_clean=clean,
            ce_spliced=spliced,
            ce_zero=zero,
            ce_mean=baseline.ce_mean,
            ce_recovered=(zero - spliced) / (zero - clean) if zero != clean else float("nan"),
            kl=divergence,
        )
        for spliced, divergence in zip(ce, kl, strict=True)
    ]


@torch.no_grad()
def _means(
    model: nn.Module,
    tokens: Tensor,
    source: Site,
    target: Site,
    functions: Sequence[Function],
    keep: Tensor,
    batch: int,
    advance: Advance | None,
    with_kl: bool = False,
) -> tuple[float, list[float], list[float]]:
    """Mean cross-entropy of the clean model, that under each function, and its KL if asked for."""
    targets = int(keep[:, 1:].sum())
    if targets == 0:
        raise ValueError("keep marks no token after the first position: nothing to score")
    clean_sum, ce, kl = 0.0, [0.0] * len(functions), [0.0] * len(functions)
    for ids, kept in zip(tokens.split(batch), keep.split(batch), strict=True):
        sequence, position = (x.to(model.device) for x in kept[:, 1:].nonzero(as_tuple=True))
        ids, kept = ids.to(model.device, torch.long), kept.to(model.device)
        wanted = ids[sequence, position + 1]
        output = body(model, ids)
        hidden = [output.last_hidden_state[sequence, position]]
        for function in functions:
            with replaced(model, source, target, _where(kept, function)):
                hidden.append(body(model, ids).last_hidden_state[sequence, position])
        for some, first, *others in zip(*(x.split(HEAD) for x in (wanted, *hidden)), strict=True):
            clean = logits(model, output, first)
            clean_sum += _cross_entropy(clean, some)
            for i, other in enumerate(others):
                spliced = logits(model, output, other)
                ce[i] += _cross_entropy(spliced, some)
                if with_kl:
                    kl[i] += _kl(clean, spliced)
        if advance:
            advance(len(ids))
    return clean_sum / targets, [x / targets for x in ce], [x / targets for x in kl]


def _where(kept: Tensor, function: Function) -> Callable[[Tensor, Tensor], Tensor]:
    """function(x) at the kept positions [sequences, context], in float32, and y at the others."""

    def apply(x: Tensor, y: Tensor) -> Tensor:
        result = y.clone()
        result[kept.view(y.shape[:-1])] = function(x[kept.view(x.shape[:-1])].float()).to(y.dtype)
        return result

    return apply


def _split(x: Tensor) -> Sequence[Tensor]:
    """Slices of at most ROWS."""
    return x.split(ROWS["cpu" if x.device.type == "cpu" else "other"])


def _cross_entropy(logits: Tensor, wanted: Tensor) -> float:
    """Summed -log p(next token), of logits [n, vocabulary] and ids [n]."""
    parts = [
        nn.functional.cross_entropy(x.float(), ids, reduction="none")
        for x, ids in zip(_split(logits), _split(wanted), strict=True)
    ]
    return torch.cat(parts).cpu().double().sum().item()


def _kl(clean: Tensor, other: Tensor) -> float:
    """Summed KL(clean || other), both [n, vocabulary]."""
    parts = []
    for x, y in zip(_split(clean), _split(other), strict=True):
        p, q = x.float().log_softmax(-1), y.float().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts).cpu().double().sum().item()
