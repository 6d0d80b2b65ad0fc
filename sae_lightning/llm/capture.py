"""Reading activations: one forward pass that ends at the deepest site."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from sae_lightning.llm.sites import Site, hook


class _Done(Exception):
    """Every site has been read: the rest of the forward pass is not needed."""


@torch.no_grad()
def capture(model: nn.Module, tokens: Tensor, sites: Collection[Site]) -> dict[Site, Tensor]:
    """Activations [sequences, context, d_site] of tokens [sequences, context], for each site.

    In the model's dtype and on its device. Blocks after the deepest site and the LM head do not
    run; no hook is left behind.
    """
    found: dict[Site, Tensor] = {}

    def reader(site: Site):
        def read(x: Tensor) -> None:
            # A copy, because Falcon goes on to add into this memory; reshaped, because OPT's MLP
            # returns [sequences * context, d].
            found[site] = x.clone().view(*tokens.shape, -1)
            if len(found) == len(wanted):
                raise _Done

        return read

    wanted = dict.fromkeys(sites)
    hooks = []
    try:
        for site in wanted:
            hooks.append(hook(model, site, reader(site)))
        tokens = tokens.to(model.device, torch.long)
        model.base_model(input_ids=tokens, use_cache=False)
    except _Done:
        pass
    finally:
        for each in hooks:
            each.remove()
    return {site: found[site] for site in wanted}
