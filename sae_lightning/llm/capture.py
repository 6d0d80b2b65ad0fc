"""Reading activations: one forward pass that ends at the deepest site."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from sae_lightning.llm.sites import Site, site_module


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
        def read(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            x = output[0] if isinstance(output, tuple) else output
            # A copy, because Falcon goes on to add into this memory; reshaped, because OPT's MLP
            # returns [sequences * context, d].
            found[site] = x.clone().view(*tokens.shape, -1)
            if len(found) == len(modules):
                raise _Done

        return read

    modules = {site: site_module(model, site) for site in sites}
    hooks = []
    try:
        for site, module in modules.items():
            hooks.append(module.register_forward_hook(reader(site)))
        tokens = tokens.to(model.device, torch.long)
        model.base_model(input_ids=tokens, use_cache=False)
    except _Done:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return {site: found[site] for site in modules}
