"""Reading activations: one forward pass that ends at the deepest site."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from sae_lightning.llm.sites import Site, hook


class _Done(Exception):
    """Every site has been read: the rest of the forward pass is not needed."""


@torch.no_grad()
def capture(
    model: nn.Module, tokens: Tensor, sites: Collection[Site], places: Tensor | None = None
) -> dict[Site, Tensor]:
    """Activations [sequences, context, d_site] of tokens [sequences, context], for each site.

    In the model's dtype and on its device. With `places` [n], positions in the flattened tokens,
    only those are copied out -> [n, d_site]. Blocks after the deepest site and the LM head do not
    run; no hook is left behind.
    """
    found: dict[Site, Tensor] = {}

    def reader(site: Site):
        def read(x: Tensor) -> None:
            # A copy, because Falcon goes on to add into this memory; reshaped, because OPT's MLP
            # returns [sequences * context, d].
            if places is None:
                found[site] = x.clone().view(*tokens.shape, -1)
            else:
                found[site] = x.reshape(tokens.numel(), -1).index_select(0, places)
            if len(found) == len(wanted):
                raise _Done

        return read

    wanted = dict.fromkeys(sites)
    hooks = []
    try:
        for site in wanted:
            hooks.append(hook(model, site, reader(site)))
        tokens = tokens.to(model.device, torch.long)
        places = places if places is None else places.to(model.device)
        with record_function("llm"):
            model.base_model(input_ids=tokens, use_cache=False)
    except _Done:
        pass
    finally:
        for each in hooks:
            each.remove()
    return {site: found[site] for site in wanted}
