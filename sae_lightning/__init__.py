"""Train sparse autoencoders on a language model's activations, and examine their features."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sae_lightning.errors import UserError

__version__: str

# For editors and type checkers. At run time `__getattr__` imports a name when it is first used, so
# that opening a saved SAE imports neither analysis tasks nor transformers.
if TYPE_CHECKING:
    from sae_lightning.analysis.annotate import annotate
    from sae_lightning.analysis.collect import collect, excerpt
    from sae_lightning.analysis.evaluate import evaluate
    from sae_lightning.analysis.explain.answers import Answers
    from sae_lightning.analysis.explain.evidence import gather
    from sae_lightning.analysis.explain.explainer import Explainer
    from sae_lightning.analysis.explain.models import Endpoint
    from sae_lightning.analysis.lens import lens
    from sae_lightning.analysis.probing.labelled_text import read_labelled_text
    from sae_lightning.analysis.probing.probes import probe
    from sae_lightning.analysis.steer import steer
    from sae_lightning.analysis.subject import open_run
    from sae_lightning.analysis.survey.survey import survey
    from sae_lightning.analysis.theory.claims import TheoryReducer, measure_claims
    from sae_lightning.commands.from_python import Run, train, train_sweep
    from sae_lightning.formats.load_sae import load_sae
    from sae_lightning.llm.generate import Sampling
    from sae_lightning.llm.load import LLMConfig
    from sae_lightning.llm.sites import LayerConfig
    from sae_lightning.stream.held_out import HeldOut
    from sae_lightning.stream.local import LocalConfig
    from sae_lightning.stream.plays import PlaysConfig

# Name -> the module that defines it.
DEFINED_IN = {
    "Answers": "analysis.explain.answers",
    "Endpoint": "analysis.explain.models",
    "Explainer": "analysis.explain.explainer",
    "HeldOut": "stream.held_out",
    "LLMConfig": "llm.load",
    "LayerConfig": "llm.sites",
    "LocalConfig": "stream.local",
    "PlaysConfig": "stream.plays",
    "Run": "commands.from_python",
    "Sampling": "llm.generate",
    "TheoryReducer": "analysis.theory.claims",
    "annotate": "analysis.annotate",
    "collect": "analysis.collect",
    "evaluate": "analysis.evaluate",
    "excerpt": "analysis.collect",
    "gather": "analysis.explain.evidence",
    "lens": "analysis.lens",
    "load_sae": "formats.load_sae",
    "measure_claims": "analysis.theory.claims",
    "open_run": "analysis.subject",
    "probe": "analysis.probing.probes",
    "read_labelled_text": "analysis.probing.labelled_text",
    "steer": "analysis.steer",
    "survey": "analysis.survey.survey",
    "train": "commands.from_python",
    "train_sweep": "commands.from_python",
}

# Not computed from DEFINED_IN, because type checkers do not evaluate expressions.
__all__ = [
    "Answers",
    "Endpoint",
    "Explainer",
    "HeldOut",
    "LLMConfig",
    "LayerConfig",
    "LocalConfig",
    "PlaysConfig",
    "Run",
    "Sampling",
    "TheoryReducer",
    "UserError",
    "annotate",
    "collect",
    "evaluate",
    "excerpt",
    "gather",
    "lens",
    "load_sae",
    "measure_claims",
    "open_run",
    "probe",
    "read_labelled_text",
    "steer",
    "survey",
    "train",
    "train_sweep",
]

if not TYPE_CHECKING:  # hidden, so that type checkers report unknown names

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return version("sae-lightning")
        if name not in DEFINED_IN:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{DEFINED_IN[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
