"""What a run's config says that SAEs read: an LLM's activations of text, or synthetic concepts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLM, device, load
from sae_lightning.llm.load import shape as llm_shape
from sae_lightning.llm.packaged import Shape
from sae_lightning.llm.sites import Site
from sae_lightning.runs.config import Config
from sae_lightning.stream.base import RowSource
from sae_lightning.stream.documents import open_text
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.stream.sources import open_rows
from sae_lightning.stream.synthetic import ConceptRows, HeldOutConcepts, open_world
from sae_lightning.stream.text import SyntheticConfig, TextConfig
from sae_lightning.stream.tokens import Tokens, open_tokens


class Inputs(NamedTuple):
    """Rows to train on and others to evaluate on."""

    rows: RowSource
    held_out: HeldOut | HeldOutConcepts
    about: dict[str, str]
    """What they come from, for a person."""


def is_text(config: Config) -> bool:
    """Whether an LLM reads text."""
    return isinstance(config.data, TextConfig)


def shape(config: Config) -> Shape:
    """Blocks and width of the LLM; concepts are like the output of an LLM's only block."""
    if isinstance(config.data, SyntheticConfig):
        return Shape(layers=1, width=config.data.dim, context=None, vocabulary=0)
    return llm_shape(config.llm)


def check_context(config: Config, llm: Shape) -> None:
    """UserError if the text's sequences are longer than the LLM can read."""
    if llm.context is not None and config.data.context > llm.context:
        raise UserError(
            f"data.context={config.data.context}: {config.llm.name} takes at most {llm.context} "
            "tokens; lower it"
        )


def metadata(config: Config) -> dict[str, Any]:
    """What SAELens wants to know of an SAE's inputs."""
    text = {"context_size": config.data.context, "prepend_bos": True} if is_text(config) else {}
    return {"model_name": config.llm.name} | text


def open_inputs(config: Config, sites: Sequence[Site], resumed: bool) -> Inputs:
    """The rows at `sites` that `config` describes; a run that is not `resumed` ends with a
    UserError where there is no space for their cache."""
    data, llm = config.data, config.llm
    if isinstance(data, SyntheticConfig):
        rows = ConceptRows(open_world(data), sites, seed=config.seed, device=device(llm))
        held_out = _concepts(config, config.eval.tokens)
        return Inputs(rows, held_out, {"concepts": _told(data)})
    loaded, tokens = open_llm(config, blocks(config, sites))
    source = loaded, tokens.train, sites
    rows = open_rows(llm, data, config.seed, *source, resumed, ahead=config.trainer.batch)
    held_out = _text(config, loaded, tokens, sites, config.eval.tokens, config.eval.loss_tokens)
    about = {"LLM": f"{llm.name}, {llm.dtype.name} on {rows.device}"}
    return Inputs(rows, held_out, about)


def blocks(config: Config, sites: Sequence[Site]) -> int | None:
    """How many of the LLM's blocks a run at `sites` needs; None for the whole LLM.

    Its loss needs all of it, and so does a cache, whose key is a hash of all of its weights.
    """
    if not is_text(config) or config.eval.loss_tokens or config.data.cache:
        return None
    return 1 + max(site.layer for site in sites)


def open_held_out(
    config: Config,
    sites: Sequence[Site],
    tokens: int | None,
    opened: tuple[LLM, Tokens] | None = None,
) -> HeldOut | HeldOutConcepts:
    """What a run is evaluated on; `tokens` of it, or None for as many as the run's own
    evaluation reads. `opened`: LLM and text, where they are open already."""
    if not is_text(config):
        return _concepts(config, tokens or config.eval.tokens)
    return _text(
        config,
        *(opened or open_llm(config, None if tokens else blocks(config, sites))),
        sites,
        tokens or config.eval.tokens,
        tokens or config.eval.loss_tokens,
    )


def open_llm(config: Config, blocks: int | None = None) -> tuple[LLM, Tokens]:
    """The LLM, or its first `blocks` blocks, and the text that it reads."""
    text = open_text(config.data)  # before the LLM: a wrong name is told at once
    llm = load(config.llm, blocks)
    return llm, open_tokens(text, llm.tokenizer, context=config.data.context, seed=config.seed)


def _text(
    config: Config,
    llm: LLM,
    text: Tokens,
    sites: Sequence[Site],
    tokens: int,
    loss_tokens: int,
) -> HeldOut:
    return HeldOut(
        llm,
        text.held_out,
        list(sites),
        tokens=tokens,
        loss_tokens=loss_tokens,
        max_norm=config.data.max_norm,
        batch=config.llm.batch,
        keep_special=config.data.keep_special,
    )


def _concepts(config: Config, tokens: int) -> HeldOutConcepts:
    data = config.data
    return HeldOutConcepts(
        open_world(data), seed=data.seed, tokens=tokens, device=device(config.llm)
    )


def _told(data: SyntheticConfig) -> str:
    bound = {"correlation": data.correlation, "hierarchy": data.hierarchy}
    return (
        f"{data.concepts:,} in {data.dim:,} dimensions, {data.l0:g} of them active, "
        f"Zipf exponent {data.zipf:g}"
        + "".join(f", {name} {value:g}" for name, value in bound.items() if value)
    )
