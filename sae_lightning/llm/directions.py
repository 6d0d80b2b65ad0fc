"""Directions of the residual stream: what tokens write, what logits read, and how blocks respond.

    r = embedding + what blocks add        logits = W_U N(r)
    N(r) = gain * centred(r) / scale(r) + b

If scale(r) is held fixed, a direction v that is added to r changes the logits by
W_U (gain * centred(v)) / scale(r) along the direct path (Elhage et al. 2021, "A mathematical
framework for transformer circuits"). scale(r) is positive, so it changes no ranking of tokens.
`measure_response` measures the effect of v through all later blocks as well.

Shapes: d = width of the residual stream.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import StopForward, replace_activations
from sae_lightning.llm.placement import find_activation_device, find_computing_device
from sae_lightning.llm.sites import Kind, Site, find_decoder_stack, find_site_module
from sae_lightning.llm.splice import run_body

TOKENS_PER_PASS = 1024  # embeddings read in one forward pass
DIRECTIONS_PER_PASS = 256  # directions added in one forward pass


class Norm(NamedTuple):
    """r -> gain * centred(r): a LayerNorm or RMSNorm without its scale and bias."""

    gain: Tensor
    """[d] float32"""
    centres: bool
    """Whether the mean over d is subtracted (LayerNorm) or not (RMSNorm)."""

    def apply_linear(self, directions: Tensor) -> Tensor:
        """gain * centred(directions) for directions [n, d] at the norm's input."""
        return self._centred(directions) * self.gain

    def apply_transpose(self, directions: Tensor) -> Tensor:
        """centred(gain * directions) for directions [n, d] at the norm's output; the result w
        has w @ r = directions @ (gain * centred(r)) for every r."""
        return self._centred(directions * self.gain)

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centres else x


def find_final_norm(model: nn.Module) -> Norm:
    """The norm between the last block and the unembedding."""
    return _find_norm_before(model, model.get_output_embeddings(), "the unembedding")


def find_mlp_norm(model: nn.Module, layer: int) -> Norm:
    """The norm between the residual stream and the MLP of a block."""
    site = Site(layer, Kind.mlp_in)
    return _find_norm_before(model, find_site_module(model, site), f"the MLP of block {layer}")


@torch.no_grad()
def _find_norm_before(model: nn.Module, reader: nn.Module, reader_name: str) -> Norm:
    """The norm whose output `reader` reads, found by running the model on one token; UserError if
    there is none."""
    outputs: list[tuple[Tensor, nn.Module]] = []  # kept alive, so that no two share an address
    inputs: list[Tensor] = []

    def keep_output(module: nn.Module, args: tuple, output: Tensor) -> None:
        # a norm keeps the shape, unlike the projection before the unembedding of OPT-350m
        if isinstance(output, Tensor) and args and args[0].shape == output.shape:
            outputs.append((output, module))

    with ExitStack() as hooks:
        for module in model.modules():
            if not list(module.children()):
                hooks.enter_context(module.register_forward_hook(keep_output))
        input_hook = reader.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        hooks.enter_context(input_hook)
        tokens = torch.zeros(1, 1, dtype=torch.long, device=find_computing_device(model))
        model(input_ids=tokens, use_cache=False)
    module = next((m for x, m in outputs if x.data_ptr() == inputs[0].data_ptr()), None)
    norm = module and _measure_norm(module, inputs[0].shape[-1])
    if norm is None:
        raise UserError(
            f"direct=true: {type(model).__name__} has no norm before {reader_name}, so the lens "
            "cannot follow directions to it; leave direct=true out"
        )
    return norm._replace(gain=norm.gain.to(find_activation_device(model)))


def _measure_norm(module: nn.Module, width: int) -> Norm | None:
    """Gain and centring of a norm of `width` elements, measured on test vectors. None if the module
    is not a norm: scaling its input changes its output.

    Weights are not read, because families store the gain differently (in Gemma it is 1 + weight).
    """
    norm = copy.deepcopy(module).float()
    device = find_computing_device(norm)

    def apply(x: Tensor) -> Tensor:
        return norm(x.to(device)[None, None])[0, 0].float()

    signs = torch.ones(width)
    signs[1::2] = -1
    bias = apply(torch.zeros(width))
    y, y_of_triple = apply(signs) - bias, apply(3 * signs) - bias
    # equal if it is a norm, up to rounding and its epsilon
    if not torch.allclose(y, y_of_triple, rtol=1e-3, atol=1e-3 * y.abs().max().item()):
        return None
    y_of_ones = apply(torch.ones(width)) - bias  # 0 if the mean is subtracted
    centres = bool(y_of_ones.abs().max() < 1e-3 * y.abs().max())
    centred = signs - signs.mean() if centres else signs
    x = centred.to(y.device)  # y = gain * x / (root mean square of x)
    return Norm(gain=y * x.square().mean().sqrt() / x, centres=centres)


@torch.no_grad()
def read_embedding(model: nn.Module, count: int) -> Tensor:
    """Input [count, d] of block 0 at position 0 for each of the first `count` token ids, float32.
    Its mean over these ids is subtracted, which removes the position embedding."""
    inputs: list[Tensor] = []

    def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        inputs.append(x[:, 0].float())
        raise StopForward

    with find_decoder_stack(model)[0].register_forward_pre_hook(keep_input, with_kwargs=True):
        device = find_computing_device(model)
        for ids in torch.arange(count, device=device)[:, None].split(TOKENS_PER_PASS):
            with suppress(StopForward):
                model.base_model(input_ids=ids, use_cache=False)
    x = torch.cat(inputs).to(find_activation_device(model))
    return x - x.mean(0)


@torch.no_grad()
def measure_response(
    model: nn.Module,
    tokens: Tensor,
    target: Site,
    directions: Tensor,
    share: float,
    advance: Callable[[int], None],
) -> Tensor:
    """How the unembedding's input changes [n, d] when each of `directions` [n, d_target] is added
    to the activation at `target`, as a mean over the sequences of `tokens`.

        BOS  It  was  the  best   of     a direction is added at this last token only, and the
         .    .   .    .    .     *      output there is compared with the unchanged LLM's

    tokens: [sequences, length]. A direction is scaled to `share` of the activation's norm.
    `advance` is called with the number of directions just done, in all 1 + n for each sequence: the
    unchanged LLM runs with a direction of zeros.
    """
    device = find_activation_device(model)
    unit = nn.functional.normalize(directions.to(device))
    additions = torch.cat([torch.zeros_like(unit[:1]), share * unit])
    total = torch.zeros(())
    for sequence in tokens.to(find_computing_device(model), torch.long):
        cache = _fill_cache(model, sequence[None, :-1])
        ids = sequence if cache is None else sequence[-1:]  # the cache holds all tokens before
        outputs = []
        for part in additions.split(DIRECTIONS_PER_PASS):
            # copied, because a forward pass writes to its cache
            past = {} if cache is None else {"past_key_values": copy.deepcopy(cache)}
            with replace_activations(model, target, target, _make_edit(part)):
                # as many as the cache holds, also for a smaller last part
                batch = ids.expand(DIRECTIONS_PER_PASS, -1)
                output = run_body(model, batch, use_cache=bool(past), **past)
            outputs.append(output.last_hidden_state[: len(part), -1].float())
            advance(len(part))
        hidden = torch.cat(outputs).to(device)
        total = total + (hidden[1:] - hidden[0]) / len(tokens)
    return total


def _fill_cache(model: nn.Module, tokens: Tensor) -> Any:
    """KV cache of tokens [1, n], repeated for DIRECTIONS_PER_PASS sequences; None for models that
    do not use transformers' DynamicCache (Mamba, RWKV, MiniMax)."""
    cache = None
    with suppress(ValueError):  # raised by xLSTM and by hybrids without an attention layer
        cache = getattr(run_body(model, tokens, use_cache=True), "past_key_values", None)
    if type(cache).__name__ != "DynamicCache":
        return None
    # repeats the cache; batch_repeat_interleave would skip states of linear attention
    cache.reorder_cache(torch.zeros(DIRECTIONS_PER_PASS, dtype=torch.long, device=tokens.device))
    return cache


def _make_edit(additions: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A function for `replace_activations` that adds norm(y) * additions[i] to the activation y at
    the last token of sequence i, for additions [n, d] and the first n sequences of the batch."""

    def apply(_: Tensor, y: Tensor) -> Tensor:
        # OPT's MLP returns [sequences * tokens, d]
        changed = y.float().view(DIRECTIONS_PER_PASS, -1, y.shape[-1])
        last = changed[: len(additions), -1]  # a view of `changed`
        last += additions * last.norm(dim=1, keepdim=True)
        return changed.view_as(y)

    return apply
