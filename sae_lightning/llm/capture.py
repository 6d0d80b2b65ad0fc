"""Captures activations in a forward pass that stops at the deepest site, or replaces them."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from sae_lightning.errors import UserError
from sae_lightning.llm.placement import find_activation_device, find_computing_device
from sae_lightning.llm.sites import Kind, Site, add_hook, find_decoder_stack, find_site_module

OTHER_BRANCH = {Kind.attn: Kind.mlp, Kind.mlp: Kind.attn}


class StopForward(Exception):
    """Raised by a hook to end a forward pass early."""


@torch.no_grad()
def capture(
    model: nn.Module, tokens: Tensor, sites: Collection[Site], positions: Tensor | None = None
) -> dict[Site, Tensor]:
    """Activations [sequences, context, d_site] of tokens [sequences, context], for each site.

    In the model's dtype, on the device that `llm.device` names. `positions` [n], indices into the
    flattened tokens, restricts the result to [n, d_site]; None keeps all. Neither the LM head nor
    blocks after the deepest site run; all hooks are removed.
    """
    input_device, output_device = find_computing_device(model), find_activation_device(model)
    tokens = tokens.to(input_device, torch.long)
    positions = positions if positions is None else positions.to(input_device)
    activations: dict[Site, Tensor | None] = dict.fromkeys(sites)
    scales = {site: measure_branch_scale(model, site) for site in sites}

    def store(site: Site, x: Tensor) -> None:
        if x.numel() != tokens.numel() * x.shape[-1]:
            raise UserError(
                f"llm.name: {site} of {type(model).__name__} has shape {list(x.shape)}, which is "
                f"not one row for each of {list(tokens.shape)} tokens; choose another LLM"
            )
        # cloned, because Falcon later adds in place to this tensor; reshaped, because OPT's MLP
        # returns [sequences * context, d]
        if positions is None:
            activations[site] = x.clone().view(*tokens.shape, -1)
        else:
            indices = positions.to(x.device)
            activations[site] = x.reshape(tokens.numel(), -1).index_select(0, indices)
        if scales[site] != 1:
            activations[site] *= scales[site]
        if all(x is not None for x in activations.values()):
            raise StopForward

    with ExitStack() as hooks, suppress(StopForward), record_function("llm"):
        for site in activations:
            hooks.enter_context(add_hook(model, site, lambda x, site=site: store(site, x)))
        model.base_model(input_ids=tokens, use_cache=False)
    for site, x in activations.items():
        if x is None:
            raise _make_skipped_error(model, site)
    return {site: x.to(output_device) for site, x in activations.items()}


def _make_skipped_error(model: nn.Module, site: Site) -> UserError:
    """The UserError for a site that a forward pass did not reach."""
    return UserError(
        f"layer.index={site.layer}: {type(model).__name__} skips {site.kind.value} of this block "
        "for text without images; choose another block"
    )


@contextmanager
def replace_activations(
    model: nn.Module, source: Site, target: Site, function: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Inside the `with`, `model` runs with function(x, y) in place of y, its activation at
    `target`.

    x: the activation at `source`, which is `target` or is computed before it. Both have the shape
    [sequences, context, d_site] ([sequences * context, d_site] at OPT's MLP) and are on the device
    that `llm.device` names; function(x, y) has the shape of y.
    """
    source_values: list[Tensor] = []  # the x of this forward pass, for the hook at `target`
    device = find_activation_device(model)
    source_scale = measure_branch_scale(model, source)
    target_scale = measure_branch_scale(model, target)

    def keep_source(x: Tensor) -> None:
        # cloned, because Falcon adds the attention's output to the MLP's in place
        source_values.append(x.clone() if source_scale == 1 else x * source_scale)

    def replace(y: Tensor) -> Tensor:
        x, y_moved = source_values.pop().to(device), y.to(device)
        if target_scale == 1:
            return function(x, y_moved).to(y)
        return (function(x, y_moved * target_scale) / target_scale).to(y)

    with add_hook(model, source, keep_source), add_hook(model, target, replace):
        yield


def measure_branch_scale(model: nn.Module, site: Site) -> float:
    """The factor with which a block adds its branch at `site` (attention or MLP) to the residual
    stream: 1 in most models, not in Granite; 1 at other sites. Measured once per model and site.

    UserError if the block does more than scale the output and add it.
    """
    scales = vars(model).setdefault("branch_scales", {})
    if site not in scales:
        scales[site] = _measure_scale(model, site) if site.kind in OTHER_BRANCH else 1.0
    return scales[site]


@torch.no_grad()
def _measure_scale(model: nn.Module, site: Site) -> float:
    """Measure the scale of the branch at `site`: run the block with known vectors in place of its
    input and of the outputs of its branches.

    input = 0    branch = c    other branch = 0        output = offset + scale * c
    input = 0    branch = 0    other branch = 0        output = offset
    input = c    branch = 0    other branch = 0        output = c, if the block only adds
    """
    other: Site | None = Site(site.layer, OTHER_BRANCH[site.kind])
    try:
        find_site_module(model, other)
    except UserError:
        other = None  # a block of a hybrid model may lack attention or MLP
    width = model.config.get_text_config().hidden_size
    c = torch.linspace(1, 2, width, dtype=model.dtype, device=find_computing_device(model))
    zeros = torch.zeros_like(c)
    zero_branches = {site: zeros} | ({other: zeros} if other else {})
    with_branch = _run_block(model, zeros, zero_branches | {site: c})
    without_branch = _run_block(model, zeros, zero_branches)
    ratios = (with_branch - without_branch).double() / c.double()
    scale, rounding = ratios.mean().item(), torch.finfo(c.dtype).eps
    if abs(scale - 1) < rounding:
        scale = 1.0
    # if the block only scales, the ratios are equal, up to a few rounding errors
    scales_only = scale > 0 and (ratios - scale).abs().max().item() < 8 * rounding * scale
    # not checked in a block without `other`: it may hold a third branch, which adds to the output
    adds_only = not other or (_run_block(model, c, zero_branches) == c).all()
    if not (scales_only and adds_only):
        block = find_decoder_stack(model)[site.layer]
        raise UserError(
            f"layer.source, layer.target: {type(block).__name__} does not just add its attention "
            "and its MLP to the residual stream (it has a third branch, or normalises or scales "
            f"the stream), so {site.kind.value} cannot be read; use layer=resid"
        )
    return scale


def _run_block(model: nn.Module, x: Tensor, branches: dict[Site, Tensor]) -> Tensor:
    """Run a block on two tokens, with x [d] as the input of both and the values [d] of `branches`
    in place of the outputs of its branches; returns its output [1, 2, d]."""
    any_site, outputs = next(iter(branches)), []  # all are in the same block
    block = find_decoder_stack(model)[any_site.layer]

    def replace_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (_expand_like(x, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": _expand_like(x, kwargs["hidden_states"])}

    def keep_output(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])
        raise StopForward

    with ExitStack() as hooks, suppress(StopForward):
        hooks.enter_context(block.register_forward_pre_hook(replace_input, with_kwargs=True))
        for site, value in branches.items():
            hook = add_hook(model, site, lambda y, value=value: _expand_like(value, y))
            hooks.enter_context(hook)
        hooks.enter_context(block.register_forward_hook(keep_output))
        tokens = torch.zeros(1, 2, dtype=torch.long, device=x.device)
        model.base_model(input_ids=tokens, use_cache=False)
    if not outputs:
        raise _make_skipped_error(model, any_site)
    return outputs[0].to(x.device)


def _expand_like(x: Tensor, other: Tensor) -> Tensor:
    """Copies of x [d] for all tokens, in the shape [..., d] and on the device of `other`."""
    return x.to(other.device).expand_as(other).clone()
