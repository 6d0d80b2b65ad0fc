"""SAEs at their place in a tiny LLM."""

from sae_lightning.analysis.subject import Subject
from sae_lightning.llm.sites import Kind, Site, Sites
from sae_lightning.sae import ARCHITECTURES, build


def make_subject(llm, source: Kind = Kind.resid, target: Kind | None = None, **settings) -> Subject:
    """A random ReLU SAE of 32 features at block 1 of a model of width 24."""
    config = ARCHITECTURES["relu"].config(features=32, decoder_norm=1.0, **settings)
    sae = build(config, 24, 24).requires_grad_(False)
    return Subject(llm, sae, Sites(Site(1, source), Site(1, target or source)))
