"""KL of the LLM's predictions without and with an SAE in place, with a gradient for the SAE.

    tokens -> blocks -> source ----------------> target -> blocks -> hidden -> logits     clean
                           \\                      |                               | KL
                            -> reconstruction -> leaf  -> blocks -> hidden -> logits     spliced

The gradient of the KL reaches the leaf through the blocks after the target only, one batch of
sequences at a time; the LLM's weights get none. The caller's backward pass continues from the leaf
to the SAE. Shapes: n = kept tokens, d_in and d_out = widths of source and target.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_lightning.llm.capture import replace_activations
from sae_lightning.llm.placement import find_activation_device, find_computing_device
from sae_lightning.llm.sites import Site
from sae_lightning.llm.splice import LOGIT_ROWS, compute_kl, compute_logits, run_body, splice_kept
from sae_lightning.ranks import ALONE, Ranks


class CleanRun(NamedTuple):
    """A forward pass of the LLM as it is."""

    tokens: Tensor
    """[sequences, context]"""
    keep: Tensor
    """[sequences, context] bool: tokens whose activations an SAE replaces"""
    output: Any
    """The output of `run_body`."""


@torch.no_grad()
def run_clean(model: nn.Module, tokens: Tensor, keep: Tensor) -> CleanRun:
    """Run the LLM without its LM head on tokens [sequences, context]; `keep` as in `CleanRun`."""
    tokens = tokens.to(find_computing_device(model), torch.long)
    return CleanRun(tokens, keep, run_body(model, tokens))


def measure_spliced_kl(
    model: nn.Module,
    runs: Sequence[CleanRun],
    source: Site,
    target: Site,
    function: Callable[[Tensor], Tensor],
    ranks: Ranks = ALONE,
) -> Tensor:
    """KL(clean || spliced) [] with function(source) in place of `target`, the mean over the
    predictions of kept tokens, with a gradient for the parameters of `function`.

    function: float32 [n, d_in] -> [n, d_out]. On several `ranks`, which all call this with the same
    runs, value and gradient are means over the ranks, so that they agree bit for bit.
    """
    # at least 1: if no token is kept, the KL is 0 / 1
    predictions = max(1, sum(int(run.keep[:, 1:].sum()) for run in runs))
    parts = [_differentiate(model, run, source, target, function) for run in runs]
    kl = ranks.sum(sum(kl for kl, _, _ in parts) / predictions) / ranks.size
    for _, reconstruction, gradient in parts:
        gradient = ranks.sum(gradient / predictions) / ranks.size
        # adds 0, and gives the reconstruction this gradient
        kl = kl + ((reconstruction - reconstruction.detach()) * gradient).sum()
    return kl


def _differentiate(
    model: nn.Module,
    run: CleanRun,
    source: Site,
    target: Site,
    function: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed KL [] of a run's predictions, the reconstruction [n, d_out] and the KL's gradient
    [n, d_out] with respect to it."""
    stored: list[Tensor] = []

    def reconstruct(x: Tensor, _: Tensor) -> Tensor:
        reconstruction = function(x)
        leaf = reconstruction.detach().requires_grad_()
        stored.extend((reconstruction, leaf))
        return leaf.to(x.device)

    clean_hidden = run.output.last_hidden_state
    # `position` predicts the kept token at position + 1
    sequence, position = (x.to(clean_hidden.device) for x in run.keep[:, 1:].nonzero(as_tuple=True))
    keep = run.keep.to(find_activation_device(model))
    with replace_activations(model, source, target, splice_kept(keep, reconstruct)):
        hidden = run_body(model, run.tokens).last_hidden_state[sequence, position]
    reconstruction, leaf = stored
    # the chunks add up hidden_leaf.grad, so that the backward pass through the blocks is run once
    hidden_leaf, total = hidden.detach().requires_grad_(), torch.zeros((), device=leaf.device)
    clean_chunks = clean_hidden[sequence, position].split(LOGIT_ROWS)
    chunks = zip(clean_chunks, hidden_leaf.split(LOGIT_ROWS), strict=True)
    for clean_chunk, spliced_chunk in chunks:
        clean_logits = compute_logits(model, run.output, clean_chunk)
        kl = compute_kl(clean_logits, compute_logits(model, run.output, spliced_chunk)).sum()
        kl.backward()
        total += kl.detach().to(leaf.device)
    (gradient,) = torch.autograd.grad(hidden, leaf, hidden_leaf.grad)
    return total, reconstruction, gradient
