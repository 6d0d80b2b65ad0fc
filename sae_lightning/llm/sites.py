"""Sites: places in a language model where activations are read or replaced.

A block adds two branches to the residual stream. A site is one of the terms, or the MLP's input:

    resid (block i) = resid (block i - 1) + attn (block i) + mlp (block i)
    mlp (block i)   = MLP(mlp_in (block i))
"""

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import total_ordering
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sae_lightning.errors import UserError

# Norms of a branch's output, as in Gemma-2 and OLMo-2; a block has both or none. In a block without
# MLP_NORMS, post_attention_layernorm is the norm before the MLP.
ATTN_NORMS = ("post_self_attn_layernorm", "post_attention_layernorm")
MLP_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
# Names of a block's children, or of their classes; OPT's MLP is two children, fc1 and fc2.
BRANCH_PATTERNS = {"attn": r"attn|attention", "mlp": r"mlp|feed_?forward|ffn|moe|fc2"}
BRANCH_PATTERNS["mlp_in"] = BRANCH_PATTERNS["mlp"].replace("fc2", "fc1")

# Config keys for the number of residual streams, in Gemma-3n, DeepSeek-V4 and Qwen-4.
STREAM_COUNTS = ("altup_num_inputs", "hc_mult", "hc_count")


@total_ordering
class Kind(Enum):
    """An activation of a block; members are in the order of computation."""

    attn = "attn"
    """The output of the attention, as added to the residual stream."""
    mlp_in = "mlp_in"
    """The input of the MLP: the residual stream after the norm."""
    mlp = "mlp"
    """The output of the MLP, as added to the residual stream."""
    resid = "resid"
    """The output of the block."""

    def __lt__(self, other: "Kind") -> bool:
        order = list(Kind)
        return order.index(self) < order.index(other)


# TransformerLens' names, within a block.
HOOK_NAMES = {
    Kind.attn: "hook_attn_out",
    # not ln2.hook_normalized, which lacks the norm's gain
    Kind.mlp_in: "mlp.hook_in",
    Kind.mlp: "hook_mlp_out",
    Kind.resid: "hook_resid_post",
}


@dataclass(frozen=True, order=True)
class Site:
    """One place in the model; sorts by depth."""

    layer: int
    """Index of the block, from 0."""
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind.value}.{self.layer}"

    @property
    def hook_name(self) -> str:
        """TransformerLens' name of this site."""
        return f"blocks.{self.layer}.{HOOK_NAMES[self.kind]}"


class SitePair(NamedTuple):
    """The site that an SAE reads and the site it reconstructs; in an autoencoder they are equal."""

    source: Site
    target: Site

    def __str__(self) -> str:
        return " -> ".join(dict.fromkeys(map(str, self)))

    @property
    def hook_names(self) -> dict[str, str]:
        """TransformerLens' names of both sites, under SAELens' keys."""
        names = {"hook_name": self.source.hook_name}
        if self.target != self.source:
            names["hook_name_out"] = self.target.hook_name
        return names

    def module_names(self, paths: dict[Site, str]) -> dict[str, str]:
        """Paths in transformers of those sites that are in `paths`, under SAELens' keys."""
        sites = {"hf_hook_name": self.source}
        if self.target != self.source:
            sites["hf_hook_name_out"] = self.target
        return {key: paths[site] for key, site in sites.items() if site in paths}


def distinct_sites(pairs: Iterable[SitePair]) -> list[Site]:
    """The sites that occur in `pairs`, by depth."""
    return sorted({site for pair in pairs for site in pair})


@dataclass(slots=True, kw_only=True)
class LayerConfig:
    """Where in the LLM the SAE reads, and what it reconstructs."""

    index: int
    """Block, counted from 0."""

    source: Kind = Kind.resid
    """What the SAE reads: resid (the block's output), attn or mlp (what that branch adds to the
    residual stream) or mlp_in (what the MLP reads)."""

    target: Kind | None = None
    """What is reconstructed; null is the source. Anything else makes the SAE a transcoder."""

    def __post_init__(self):
        if self.index < 0:
            raise UserError(f"layer.index={self.index}: blocks are counted from 0; give 0 or more")
        if self.target is not None and self.target < self.source:
            later = ", ".join(kind.value for kind in Kind if kind >= self.source)
            raise UserError(
                f"layer.target={self.target.value}: a block computes it before its "
                f"{self.source.value} (layer.source), so it cannot be computed from that; "
                f"choose from {later}"
            )

    def resolve_sites(self, layers: int) -> SitePair:
        """Source and target in an LLM of `layers` blocks; UserError if it has no such block."""
        if self.index >= layers:
            raise UserError(
                f"layer.index={self.index}: this LLM has {layers} blocks; give 0 to {layers - 1}"
            )
        return SitePair(Site(self.index, self.source), Site(self.index, self.target or self.source))


def find_decoder_stack(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks of any causal LM."""
    return _find_decoder(model)[1]


def find_text_decoder(model: nn.Module) -> nn.Module:
    """The module that runs the decoder blocks."""
    return _find_decoder(model)[0]


def _find_decoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the decoder blocks, and their list."""
    # kept_blocks: set where later blocks were removed (pretrained.py)
    layers = getattr(model, "kept_blocks", model.config.get_text_config().num_hidden_layers)
    # get_decoder of ModernBERT returns its LM head, so the whole model is searched next. Outer
    # modules come first, so the stack is found before lists within a block (experts).
    for root in (model.get_decoder(), model):
        for name, module in root.named_modules():
            if re.search("vision|visual|image|audio", name):
                continue
            for child in module.children():
                if isinstance(child, nn.ModuleList) and len(child) == layers:
                    return module, child
    raise UserError(
        f"llm.name: no list of {layers} decoder blocks in {type(model).__name__}; "
        "choose a decoder-only transformer"
    )


def find_site_module(model: nn.Module, site: Site) -> nn.Module:
    """The module whose output, or for mlp_in whose input, is the activation at `site`."""
    stack = find_decoder_stack(model)
    # UserError if there is no such block
    LayerConfig(index=site.layer, source=site.kind).resolve_sites(len(stack))
    block, text_config = stack[site.layer], model.config.get_text_config()
    streams = max(getattr(text_config, name, None) or 1 for name in STREAM_COUNTS)
    if streams > 1 and site.kind is not Kind.mlp_in:
        raise UserError(
            f"layer.source, layer.target: {type(block).__name__} passes on {streams} residual "
            f"streams and mixes them: there is no single {site.kind.value}; use "
            "layer.source=mlp_in, or choose another LLM"
        )
    if site.kind is Kind.resid:
        return block
    if site.kind is not Kind.mlp_in and any(hasattr(block, name) for name in MLP_NORMS):
        norms = ATTN_NORMS if site.kind is Kind.attn else MLP_NORMS
        for name in norms:
            if hasattr(block, name):
                return getattr(block, name)
    return _find_branch(block, site.kind)


def find_module_paths(model: nn.Module, sites: Iterable[Site]) -> dict[Site, str]:
    """Dotted path of the module whose output is the activation, for each site but mlp_in."""
    names = {module: name for name, module in model.named_modules()}
    return {s: names[find_site_module(model, s)] for s in sites if s.kind is not Kind.mlp_in}


def add_hook(
    model: nn.Module, site: Site, function: Callable[[Tensor], Tensor | None]
) -> RemovableHandle:
    """In each forward pass, call function(x) and replace x by its result, unless that is None.

    x: the output of the module at `site` (its input for mlp_in) in the model's dtype, [sequences,
    context, d_site], or [sequences * context, d_site] at OPT's MLP.
    """

    def replace_first(values: Tensor | tuple | list) -> Tensor | tuple | list | None:
        if isinstance(values, Tensor):
            return function(values)
        x = function(values[0])
        return None if x is None else type(values)((x, *values[1:]))

    module = find_site_module(model, site)
    if site.kind is Kind.mlp_in:
        return module.register_forward_pre_hook(lambda module, args: replace_first(args))
    return module.register_forward_hook(lambda module, args, output: replace_first(output))


def _find_branch(block: nn.Module, kind: Kind) -> nn.Module:
    """The attention or the MLP of a block, recognised by the name of the child or of its class."""
    children = {
        name: child
        for name, child in block.named_children()
        if not re.search(r"norm|ln_|dropout|cross", name + type(child).__name__.lower())
    }
    pattern = BRANCH_PATTERNS[kind.value]
    matches = [child for name, child in children.items() if re.search(pattern, name)]
    if not matches:
        classes = {child: type(child).__name__.lower() for child in children.values()}
        matches = [child for child, name in classes.items() if re.search(pattern, name)]
    # BLOOM's modules add the residual stream themselves, so they do not return the branch alone.
    if len(matches) == 1 and "residual" not in inspect.signature(matches[0].forward).parameters:
        return matches[0]
    listing = ", ".join(f"{n} ({type(c).__name__})" for n, c in block.named_children())
    raise UserError(
        f"layer.source, layer.target: cannot tell which part of {type(block).__name__} is its "
        f"{'attention' if kind is Kind.attn else 'MLP'} (it holds {listing}); use layer=resid"
    )
