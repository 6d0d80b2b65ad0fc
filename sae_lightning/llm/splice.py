"""Loss of the language model with the activation at a site replaced (cross-entropy and KL).

    tokens -> body -> last hidden states [sequences, context, d]
                           at kept positions [n, d] -> LM head -> logits [n, vocabulary]

Logits are computed a few positions at a time: the logits of a whole batch would be the largest
tensor of the LLM. Shapes: d = width of the residual stream.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import replace_activations
from sae_lightning.llm.placement import find_activation_device, find_computing_device
from sae_lightning.llm.sites import Site, find_text_decoder
from sae_lightning.ranks import ALONE, Ranks

LOGIT_ROWS = 256  # positions whose logits are computed at a time
# Positions whose logits are converted to float32 at a time. On a CPU, 32 rows of 50,000 fit in the
# cache and are six times as fast as 256; a GPU is faster with fewer, larger chunks.
FLOAT32_ROWS = {"cpu": 32, "other": 128}

Function = Callable[[Tensor], Tensor]  # source -> replacement of the target
Edit = Callable[[Tensor, Tensor], Tensor]  # source, target -> replacement of the target
Advance = Callable[[int], None]  # called with the number of sequences that have just been scored


class SpliceBaseline(NamedTuple):
    """The cross-entropies of `SpliceScores` that do not depend on the SAE (nats per token)."""

    ce_clean: float
    ce_zero: float
    ce_mean: float


class SpliceScores(NamedTuple):
    """Next-token loss of the model with the target replaced (nats per token)."""

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
    NaN if zero ablation changes nothing."""
    kl: float
    """Mean KL(clean || spliced) of the next-token distributions."""
    ce_error: float | None = None
    """Cross-entropy with the target replaced by the mean of function(source) plus the error, target
    - function(source). None if not measured."""


def score_baseline(
    model: nn.Module,
    tokens: Tensor,
    target: Site,
    keep: Tensor,
    mean: Tensor,
    batch: int,
    advance: Advance = lambda n: None,
    ranks: Ranks = ALONE,
) -> SpliceBaseline:
    """Cross-entropies shared by all functions: computed once and passed to `score_splices`.

    tokens, keep, batch, advance, ranks: as in `score_splices`; mean [d_out]: the mean activation.
    """
    ablations = [lambda _, y: torch.zeros_like(y), lambda _, y: mean.to(y).expand_as(y)]
    clean, (zero, mean_ablated), _ = _measure_means(
        model, tokens, target, target, ablations, keep, batch, advance, ranks
    )
    return SpliceBaseline(ce_clean=clean, ce_zero=zero, ce_mean=mean_ablated)


def score_splices(
    model: nn.Module,
    tokens: Tensor,
    source: Site,
    target: Site,
    functions: Sequence[Function],
    keep: Tensor,
    baseline: SpliceBaseline,
    batch: int,
    advance: Advance = lambda n: None,
    ranks: Ranks = ALONE,
    means: Sequence[Tensor] = (),
) -> list[SpliceScores]:
    """Cross-entropy and KL of the model with each function of `source` in place of `target`.

    tokens, keep (bool): [sequences, context]; functions: float32 [n, d_in] -> [n, d_out];
    baseline: of the same tokens and keep; batch: sequences per forward pass. The clean model runs
    once for all functions. `ranks` share the batches and call the functions equally often, because
    the functions may communicate. Only positions in `keep` are replaced, in the ablations too: an
    SAE never sees BOS and other special tokens. The scores are means over the predictions of kept
    tokens. `means`: the mean output [d_out] of each function, to measure `ce_error` too (one more
    forward pass of each batch for each function).
    """
    edits = [partial(_ignore_target, function) for function in functions]
    pairs = zip(functions, means, strict=False)  # none if `means` is empty: error_ce is then None
    edits += [partial(_keep_error, function, mean) for function, mean in pairs]
    clean, ce, kl = _measure_means(
        model, tokens, source, target, edits, keep, batch, advance, ranks, with_kl=True
    )
    zero, spliced_ce, error_ce = baseline.ce_zero, ce[: len(functions)], ce[len(functions) :]
    return [
        SpliceScores(
            ce_clean=clean,
            ce_spliced=spliced,
            ce_zero=zero,
            ce_mean=baseline.ce_mean,
            ce_recovered=(zero - spliced) / (zero - clean) if zero != clean else float("nan"),
            kl=divergence,
            ce_error=error,
        )
        for spliced, divergence, error in zip_longest(spliced_ce, kl[: len(functions)], error_ce)
    ]


def _ignore_target(function: Function, x: Tensor, y: Tensor) -> Tensor:
    return function(x)


def _keep_error(function: Function, mean: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Replace function(x), which is a part of y, by its mean."""
    return y - function(x) + mean.to(y)


@torch.no_grad()
def _measure_means(
    model: nn.Module,
    tokens: Tensor,
    source: Site,
    target: Site,
    edits: Sequence[Edit],
    keep: Tensor,
    batch: int,
    advance: Advance,
    ranks: Ranks,
    with_kl: bool = False,
) -> tuple[float, list[float], list[float]]:
    """Mean cross-entropy of the clean model, then lists of the mean cross-entropy and KL with each
    edit; the list of KLs is empty unless `with_kl`."""
    predictions = int(keep[:, 1:].sum())  # nothing predicts the first position
    if predictions == 0:
        raise ValueError("keep marks no token after the first position: nothing to score")
    batches = list(zip(tokens.split(batch), keep.split(batch), strict=True))
    chunk_sums: list[list[list[float]]] = []  # results of `_sum_chunks` for this rank's batches
    for start in range(0, len(batches), ranks.size):
        round_batches = batches[start : start + ranks.size]
        # In the last round, ranks without a batch repeat one: edits may communicate.
        ids, kept = round_batches[min(ranks.rank, len(round_batches) - 1)]
        chunk_sums.append(_sum_chunks(model, ids, kept, source, target, edits, with_kl))
        advance(sum(len(ids) for ids, _ in round_batches))
    by_rank = ranks.gather_values(chunk_sums)
    sums = [0.0] * (1 + (1 + with_kl) * len(edits))  # clean, then CEs and KLs of the edits
    for i in range(len(batches)):  # in the order of a run on one rank, for the same rounding
        turn, rank = divmod(i, ranks.size)
        for chunk in by_rank[rank][turn]:
            sums = [total + x for total, x in zip(sums, chunk, strict=True)]
    clean, *with_edits = (total / predictions for total in sums)
    return clean, with_edits[: len(edits)], with_edits[len(edits) :]


def _sum_chunks(
    model: nn.Module,
    ids: Tensor,
    keep: Tensor,
    source: Site,
    target: Site,
    edits: Sequence[Edit],
    with_kl: bool,
) -> list[list[float]]:
    """Sums over each chunk of LOGIT_ROWS predictions of a batch [sequences, context]: cross-entropy
    of the clean model, then the cross-entropy and, `with_kl`, the KL with each edit."""
    ids = ids.to(find_computing_device(model), torch.long)
    output = run_body(model, ids)
    device = output.last_hidden_state.device  # where the last block computes
    # `position` predicts the kept token at position + 1
    sequence, position = (x.to(device) for x in keep[:, 1:].nonzero(as_tuple=True))
    keep, next_ids = keep.to(find_activation_device(model)), ids.to(device)[sequence, position + 1]
    clean_hidden, edited_hidden = output.last_hidden_state[sequence, position], []
    for edit in edits:
        with replace_activations(model, source, target, splice_kept(keep, edit)):
            edited_hidden.append(run_body(model, ids).last_hidden_state[sequence, position])
    chunks = []
    for start in range(0, len(next_ids), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        clean = compute_logits(model, output, clean_hidden[rows])
        ce, kl = [_sum_cross_entropy(clean, next_ids[rows])], []
        for hidden in edited_hidden:
            spliced = compute_logits(model, output, hidden[rows])
            ce.append(_sum_cross_entropy(spliced, next_ids[rows]))
            if with_kl:
                kl.append(compute_kl(clean, spliced).cpu().double().sum().item())
        chunks.append(ce + kl)
    return chunks


def run_body(model: nn.Module, tokens: Tensor, use_cache: bool = False, **settings):
    """Run a causal LM without its LM head on tokens [sequences, context]; returns the output of
    transformers, whose `last_hidden_state` [sequences, context, d] the LM head reads."""
    return _find_body(model)(input_ids=tokens, use_cache=use_cache, **settings)


def _find_body(model: nn.Module) -> nn.Module:
    # base_model of Llama 4 and Mllama is the whole model
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def compute_logits(model: nn.Module, output, hidden: Tensor) -> Tensor:
    """Logits [n, vocabulary] of last hidden states [n, d], with whatever the family does after its
    LM head (a soft cap in Gemma-2, a scale in Cohere). `output`: any output of `run_body`.

    The model itself computes the logits, with its body replaced by a stub that returns `hidden`.
    """
    calls: list[bool] = []

    def return_hidden(*_, **__):
        calls.append(True)
        return type(output)(last_hidden_state=hidden[None])

    # OPT calls the decoder directly
    bodies = {_find_body(model), find_text_decoder(model)} - {model}
    # accelerate may have set a `forward` on the module, in place of the method of its class
    forwards = [(module, vars(module).pop("forward", None)) for module in bodies]
    try:
        for module in bodies:
            module.forward = return_hidden
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        for module, forward in forwards:
            del module.forward
            if forward is not None:
                module.forward = forward
    if not calls:
        raise UserError(
            f"llm.name: cannot tell the LM head of {type(model).__name__} from what comes before "
            "it; set eval.loss_tokens=0, or choose another LLM"
        )
    return logits[0]


def splice_kept(keep: Tensor, edit: Edit) -> Edit:
    """An edit that applies `edit` at the kept positions [sequences, context], in float32, and
    leaves y as it is elsewhere."""

    def apply(x: Tensor, y: Tensor) -> Tensor:
        result, kept_y = y.clone(), keep.view(y.shape[:-1])
        result[kept_y] = edit(x[keep.view(x.shape[:-1])].float(), y[kept_y].float()).to(y.dtype)
        return result

    return apply


def _split_rows(x: Tensor) -> Sequence[Tensor]:
    return x.split(FLOAT32_ROWS["cpu" if x.device.type == "cpu" else "other"])


def _sum_cross_entropy(logits: Tensor, next_ids: Tensor) -> float:
    """Sum of -log p(next token) for logits [n, vocabulary] and next tokens [n]."""
    parts = [
        nn.functional.cross_entropy(x.float(), ids, reduction="none")
        for x, ids in zip(_split_rows(logits), _split_rows(next_ids), strict=True)
    ]
    return torch.cat(parts).cpu().double().sum().item()


def compute_kl(clean: Tensor, other: Tensor) -> Tensor:
    """KL(clean || other) [n] for logits [n, vocabulary]."""
    parts = []
    for x, y in zip(_split_rows(clean), _split_rows(other), strict=True):
        p, q = x.float().log_softmax(-1), y.float().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)
