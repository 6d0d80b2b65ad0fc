"""Train sparse autoencoders on a language model's activations, and read what they found."""

from importlib import import_module
from typing import Any

from sae_lightning.errors import UserError
from sae_lightning.export import load_sae

# Name -> module: found when they are asked for, because a saved SAE is opened without them.
FOUND_IN = {
    "collect": "analysis.survey.collect",
    "evaluate": "analysis.evaluate",
    "lens": "analysis.lens",
    "open_run": "trained",
    "probe": "analysis.probing.probes",
    "steer": "analysis.steering",
    "survey": "analysis.survey.survey",
    "theory": "analysis.theory.claims",
}

__all__ = ["UserError", "load_sae", *FOUND_IN]


def __getattr__(name: str) -> Any:
    if name not in FOUND_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FOUND_IN[name]}"), name)
