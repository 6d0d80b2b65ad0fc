"""What adding a direction at a site does to what the unembedding reads, through all blocks above.

    BOS  It  was  the  best   of     a direction is added at this last token only,
     .    .   .    .    .     *      and what comes out there is compared with the LLM as it is

Shapes: contexts, length = token sequences, BOS first; d = width of the residual stream.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sae_lightning.llm.logits import body_of
from sae_lightning.llm.sites import Site
from sae_lightning.llm.splice import replaced

BATCH = 256  # directions that are added in one pass


@torch.no_grad()
def response(
    model: nn.Module,
    tokens: Tensor,
    target: Site,
    directions: Tensor,
    share: float,
    advance: Callable[[int], None],
) -> Tensor:
    """Mean change [n, d] of the unembedding's input at the last token of `tokens` [contexts,
    length], when each of `directions` [n, d_target] is added at `target`, as long as `share` of the
    activation there; advance is called with the directions just done, once for each context."""
    unit = nn.functional.normalize(directions.to(model.device))
    steps = torch.cat([torch.zeros_like(unit[:1]), share * unit]).split(BATCH)
    total = torch.zeros(())
    body = body_of(model)
    for context in tokens.to(model.device, torch.long):
        memory = body(input_ids=context[None, :-1], use_cache=True).past_key_values
        memory.batch_repeat_interleave(BATCH)
        last = context[-1:].expand(BATCH, -1)
        found = []
        for step in steps:
            with replaced(model, target, target, _adding(step)):
                # a pass writes into its cache
                output = body(input_ids=last, past_key_values=copy.deepcopy(memory), use_cache=True)
            found.append(output.last_hidden_state[: len(step), -1].float())
            advance(len(step))
        found = torch.cat(found)
        total = total + (found[1:] - found[0]) / len(tokens)
    return total


def _adding(step: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """y + step |y| for the first sequences of a batch of one token each."""

    def apply(x: Tensor, y: Tensor) -> Tensor:
        changed = y.view(BATCH, -1).float()  # OPT's MLP has no dimension for tokens
        changed[: len(step)] += step * changed[: len(step)].norm(dim=1, keepdim=True)
        return changed.view_as(y)

    return apply
