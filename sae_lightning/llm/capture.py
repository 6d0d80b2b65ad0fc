"""Reading activations, in a forward pass that ends at the deepest site, and replacing them."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from sae_lightning.errors import UserError
from sae_lightning.llm.sites import Kind, Site, add_hook, find_decoder_stack, find_site_module


class StopForward(Exception):
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
    factors = {site: measure_branch_scale(model, site) for site in sites}

    def read(site: Site, x: Tensor) -> None:
        if x.numel() != tokens.numel() * x.shape[-1]:
            raise UserError(
                f"llm.name: {site} of {type(model).__name__} is of shape {list(x.shape)}, which is "
                f"not one row for each of {list(tokens.shape)} tokens; choose another LLM"
            )
        # A copy, because Falcon goes on to add into this memory; reshaped, because OPT's MLP
        # returns [sequences * context, d].
        if places is None:
            found[site] = x.clone().view(*tokens.shape, -1)
        else:
            found[site] = x.reshape(tokens.numel(), -1).index_select(0, places)
        if factors[site] != 1:
            found[site] *= factors[site]
        if all(x is not None for x in found.values()):
            raise StopForward

    with ExitStack() as hooks, suppress(StopForward), record_function("llm"):
        for site in found:
            hooks.enter_context(add_hook(model, site, lambda x, site=site: read(site, x)))
        model.base_model(input_ids=tokens, use_cache=False)
    for site, x in found.items():
        if x is None:
            raise _left_out(model, site)
    return found


def _left_out(model: nn.Module, site: Site) -> UserError:
    return UserError(
        f"layer.index={site.layer}: {type(model).__name__} leaves out {site.kind.value} of this "
        "block where it reads text alone; choose another block"
    )


@contextmanager
def replace_activations(
    model: nn.Module, source: Site, target: Site, function: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Inside the block, `model` runs with function(x, y) in place of y, its activation at `target`.

    x: that at `source`, which the model computes before `target` or which is the same site. Both
    as `add_hook` gives them; function returns the shape of y.
    """
    read: list[Tensor] = []
    reads, writes = measure_branch_scale(model, source), measure_branch_scale(model, target)

    def replace(y: Tensor) -> Tensor:
        if writes == 1:
            return function(read.pop(), y).to(y.dtype)
        return (function(read.pop(), y * writes) / writes).to(y.dtype)

    # A copy, because Falcon adds the attention's output into the MLP's.
    with (
        add_hook(model, source, lambda x: read.append(x.clone() if reads == 1 else x * reads)),
        add_hook(model, target, replace),
    ):
        yield


def measure_branch_scale(model: nn.Module, site: Site) -> float:
    """What the block multiplies that which the module of `site` returns by, to add it to the
    residual stream: 1 but in Granite and a few others. Measured once.

    UserError: it does something else with it.
    """
    known = vars(model).setdefault("factors", {})
    if site not in known:
        known[site] = _measured(model, site) if site.kind in OTHER_BRANCH else 1.0
    return known[site]


OTHER_BRANCH = {Kind.attn: Kind.mlp, Kind.mlp: Kind.attn}  # each and the other one


@torch.no_grad()
def _measured(model: nn.Module, site: Site) -> float:
    """The scale of one branch, measured by feeding the block known vectors in place of its input x
    and its branches.

    x = 0    branch = c    other = 0        the output is the scale times c
    x = c    branch = 0    other = 0        is c, or the block does more than to add both
    """
    other: Site | None = Site(site.layer, OTHER_BRANCH[site.kind])
    try:
        find_site_module(model, other)
    except UserError:
        other = None  # a block of a hybrid model has one of them, beside a mixer
    width = model.config.get_text_config().hidden_size
    c = torch.linspace(1, 2, width, dtype=model.dtype, device=model.device)
    nothing = torch.zeros_like(c)
    silent = {site: nothing} | ({other: nothing} if other else {})
    change = _output(model, nothing, silent | {site: c}) - _output(model, nothing, silent)
    ratio = change.double() / c.double()
    found, rounding = ratio.mean().item(), torch.finfo(c.dtype).eps
    if abs(found - 1) < rounding:
        found = 1.0
    steady = found > 0 and (ratio - found).abs().max().item() < 8 * rounding * found
    if not steady or (other and not (_output(model, c, silent) == c).all()):
        block = find_decoder_stack(model)[site.layer]
        raise UserError(
            f"layer.source, layer.target: {type(block).__name__} does not just add its attention "
            "and its MLP to the residual stream (it has a third branch, or normalises or scales "
            f"the stream), so that {site.kind.value} is no term of it; use layer=resid"
        )
    return found


def _output(model: nn.Module, x: Tensor, branches: dict[Site, Tensor]) -> Tensor:
    """What a block makes [1, 2, d] of x [d] at each of two tokens, and of its `branches` [d]."""
    block, found = find_decoder_stack(model)[next(iter(branches)).layer], []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (_like(x, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": _like(x, kwargs["hidden_states"])}

    def leave(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])
        raise StopForward

    with ExitStack() as hooks, suppress(StopForward):
        hooks.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
        for site, value in branches.items():
            hooks.enter_context(add_hook(model, site, lambda y, value=value: _like(value, y)))
        hooks.enter_context(block.register_forward_hook(leave))
        tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        model.base_model(input_ids=tokens, use_cache=False)
    if not found:
        raise _left_out(model, next(iter(branches)))
    return found[0]


def _like(x: Tensor, other: Tensor) -> Tensor:
    return x.expand_as(other).clone()
