"""Train sparse autoencoders on a language model's activations, and read what they found."""

from importlib import import_module
from typing import Any

from sae_lightning.errors import UserError

# Name -> module: found when they are asked for; a saved SAE is opened without the others.
FOUND_IN = {
    "Answers": "analysis.explain.answers",
    "Endpoint": "analysis.explain.models",
    "Explainer": "analysis.explain.explainer",
    "HeldOut": "stream.held_out",
    "LLMConfig": "llm.load",
    "LayerConfig": "llm.sites",
    "LocalConfig": "stream.local",
    "PlaysConfig": "stream.plays",
    "Sampling": "llm.generate",
    "TheoryReducers": "analysis.theory.claims",
    "annotate": "analysis.annotate",
    "collect": "analysis.collect",
    "evaluate": "analysis.evaluate",
    "excerpt": "analysis.collect",
    "gather": "analysis.explain.evidence",
    "labelled": "analysis.probing.labelled",
    "lens": "analysis.lens",
    "load_sae": "formats.export",
    "open_run": "analysis.subject",
    "probe": "analysis.probing.probes",
    "steer": "analysis.steer",
    "survey": "analysis.survey.survey",
    "theory": "analysis.theory.claims",
}

__all__ = ["UserError", *FOUND_IN]


def __getattr__(name: str) -> Any:
    if name not in FOUND_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FOUND_IN[name]}"), name)
