"""Reading activations, in a forward pass that ends at the deepest site, and replacing them."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from sae_lightning.llm.sites import Site, hook


class Done(Exception):
    """What was to be read has been read: the rest of the forward pass is not needed."""


@torch.no_grad()
def capture(
    model: nn.Module, tokens: Tensor, sites: Collection[Site], places: Tensor | None = None
) -> dict[Site, Tensor]:
    """Activations [sequences, context, d_site] of tokens [sequences, context], for each site.

    In the model's dtype and on its device. With `places` [n], positions in the flattened tokens,
    only those are copied out -> [n, d_site]. Blocks after the deepest site and the LM head do not
    run; no hook is left behind.
    """
    tokens = tokens.to(model.device, torch.long)
    places = places if places is None else places.to(model.device)
    found: dict[Site, Tensor | None] = dict.fromkeys(sites)

    def read(site: Site, x: Tensor) -> None:
        # A copy, because Falcon goes on to add into this memory; reshaped, because OPT's MLP
        # returns [sequences * context, d].
        if places is None:
            found[site] = x.clone().view(*tokens.shape, -1)
        else:
            found[site] = x.reshape(tokens.numel(), -1).index_select(0, places)
        if all(x is not None for x in found.values()):
            raise Done

    with ExitStack() as hooks, suppress(Done), record_function("llm"):
        for site in found:
            hooks.enter_context(hook(model, site, lambda x, site=site: read(site, x)))
        model.base_model(input_ids=tokens, use_cache=False)
    return found


@contextmanager
def replaced(
    model: nn.Module, source: Site, target: Site, function: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Inside the block, `model` runs with function(x, y) in place of y, its activation at `target`.

    x: that at `source`, which the model computes before `target` or which is the same site. Both
    as `hook` gives them; function returns the shape of y.
    """
    read: list[Tensor] = []

    def replace(y: Tensor) -> Tensor:
        return function(read.pop(), y).to(y.dtype)

    # A copy, because Falcon adds the attention's output into the MLP's.
    with (
        hook(model, source, lambda x: read.append(x.clone())),
        hook(model, target, replace),
    ):
        yield
