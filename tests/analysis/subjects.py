"""SAEs at their place in a tiny LLM."""

from pathlib import Path

from sae_lightning.analysis.subject import Subject
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import Kind, LayerConfig, Site, SitePair
from sae_lightning.runs.config import Config
from sae_lightning.sae import ARCHITECTURES, SAE, build_sae
from sae_lightning.stream.plays import PlaysConfig


def make_subject(llm, source: Kind = Kind.resid, target: Kind | None = None, **settings) -> Subject:
    """A random ReLU SAE of 32 features, half of them active, at block 1 of a model of width 24."""
    config = ARCHITECTURES["relu"].config(features=32, start_bias=0.0, **settings)
    sites = SitePair(Site(1, source), Site(1, target or source))
    return place(llm, build_sae(config, 24, 24), sites)


def place(llm, sae: SAE, sites: SitePair, **data) -> Subject:
    """The SAE in an LLM that is loaded already; data: settings of the text."""
    config = Config(
        llm=LLMConfig(name="tiny"),
        data=PlaysConfig(**data),
        layer=LayerConfig(index=sites.source.layer),
        model=sae.config,
        loss=ARCHITECTURES[sae.config.name].loss(),
    )
    subject = Subject(Path(), sae.requires_grad_(False), sites, config)
    subject.llm, subject.tokenizer = llm, llm.tokenizer
    return subject
