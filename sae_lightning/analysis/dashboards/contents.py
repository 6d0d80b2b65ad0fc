"""What dashboards are made from: the settings, the catalogue, and the effects on the logits."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sae_lightning.analysis.lens import measure_effects
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.survey.features_task import FeaturesTask
from sae_lightning.analysis.task import parse_integers
from sae_lightning.errors import UserError
from sae_lightning.llm.sites import Kind
from sae_lightning.report.catalogue import Catalogue, LogitEffect
from sae_lightning.terminal import console

# Pattern -> replacement: from an LLM's name on the hub, in lower case, to Neuronpedia's id of it.
MODEL_ID_PATTERNS = {
    r"^smollm2$": "smollm2-135m",  # packaged
    r"^gpt2$": "gpt2-small",
    r"^llama-3": "llama3",
    r"^(gemma-3-.*)-pt$": r"\1",
    r"^(qwen3\.5-.*)-base$": r"\1-pt",
    r"-instruct$": "-it",
}
# Kind of site -> Neuronpedia's word for it.
SITE_WORDS = {Kind.resid: "res", Kind.mlp: "mlp", Kind.attn: "att", Kind.mlp_in: "mlp-in"}
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # names become folders and addresses
SUFFIX_MARK = "__"  # between the name of a set and the suffix


@dataclass(slots=True, kw_only=True)
class DashboardSettings(FeaturesTask):
    """Settings of the formats that hold dashboards instead of weights."""

    tokens: int = 131_072
    """Tokens to read for the examples, unless an earlier task has saved a catalogue. If tokens,
    examples or neurons is given, a new catalogue is made."""
    feature: Any = None
    """A feature or a list of them; null for all."""
    direct: bool = False
    """Take a feature's effect on the logits from the direct path (the logit lens), as SAEDashboard
    does, and not through the later blocks."""
    vectors: bool = False
    """Write the decoder rows too, so that Neuronpedia can steer without the SAE. It then also lists
    each feature among your vectors."""
    model_id: str | None = None
    """Neuronpedia's id of the LLM, such as gpt2-small; null derives it from llm.name."""
    source_set: str | None = None
    """Name of the set of SAEs, such as res-jb; null makes it of site, architecture and size."""
    suffix: str | None = None
    """Distinguishes SAEs of the same set and block, such as l0-30."""
    release: str | None = None
    """Id of the release; null for the name of the set."""
    description: str | None = None
    """A sentence that describes the release."""
    creator: str = "anonymous"
    """Your name, or that of your group."""
    creator_id: str = "clkht01d40000jv08hvalcvly"
    """Id of the user in Neuronpedia's database; the default is that of every new installation."""
    url: str | None = None
    """Address of a paper or repository."""

    def __post_init__(self):
        FeaturesTask.__post_init__(self)
        self.feature = parse_integers("feature", self.feature)
        for name in ("model_id", "source_set", "suffix", "release", "creator_id"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(NAME_PATTERN, value):
                raise UserError(f"{name}={value}: give letters, digits and any of . _ -")
        if SUFFIX_MARK in (self.source_set or ""):
            raise UserError(
                f"source_set={self.source_set}: {SUFFIX_MARK} separates the suffix; give that as "
                "suffix=..."
            )


class SourceName(NamedTuple):
    """Where Neuronpedia, which calls an SAE a source, lists it."""

    model: str
    """Id of the LLM."""
    layer: int
    """Index of the block that the SAE reads."""
    source_set: str
    """Name of the set of SAEs."""
    suffix: str | None

    @property
    def id(self) -> str:
        """The SAE's id in Neuronpedia, <layer>-<set>[__<suffix>]."""
        return f"{self.layer}-{self.source_set}" + (
            f"{SUFFIX_MARK}{self.suffix}" if self.suffix else ""
        )


class DashboardContent(NamedTuple):
    """Everything that the dashboards of some features show."""

    subject: Subject
    settings: DashboardSettings
    catalogue: Catalogue
    features: list[int]
    """The features to write, ascending."""
    effect: LogitEffect | None
    """Effects of all features; None with `direct` if there is no direct path."""

    @property
    def name(self) -> SourceName:
        """Where Neuronpedia lists the SAE: from the settings, or else derived from LLM and SAE."""
        settings, (source, target) = self.settings, self.subject.sites
        kind = SITE_WORDS[source.kind] if source == target else "tc"  # transcoder
        config = self.subject.sae.config
        derived = f"{kind}-{config.name.replace('_', '')}-{config.features}"
        model = settings.model_id or derive_model_id(self.subject.config.llm.name)
        return SourceName(model, source.layer, settings.source_set or derived, settings.suffix)

    @property
    def dataset(self) -> str:
        """Name of the text. If it is a path, only its last part, because the files are meant for
        uploading."""
        text = self.subject.describe()["text"]
        return Path(text).name if Path(text).is_absolute() else text

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """Number of sequences that hold the tokens of the statistics, and the length of each, BOS
        included."""
        context = self.subject.config.data.context
        return -(-self.catalogue.statistics.tokens // (context - 1)), context  # - 1: BOS


def open_content(task: DashboardSettings, given_settings: Collection[str]) -> DashboardContent:
    """Open SAE, LLM and text, and find or make the catalogue. UserError for data without an LLM."""
    subject = task.load_subject(given_settings)
    features = subject.check_features(sorted({*(task.feature or range(subject.features))}))
    _ = subject.tokenizer  # UserError for data without an LLM
    catalogue = task.find_catalogue(subject, given_settings)
    effect = catalogue.effect
    new_fields = [catalogue.linear_histogram, catalogue.neighbours, effect and effect.histogram]
    if any(field is None for field in new_fields):
        console.print("the catalogue is of an older version, without histograms: making a new one")
        catalogue = task.make_catalogues(subject).features
    effect = measure_effects(subject, None) if task.direct else catalogue.effect
    return DashboardContent(subject, task, catalogue, features, effect)


def derive_model_id(llm: str) -> str:
    """Derive Neuronpedia's id of an LLM from its name on the hub, or from its folder's name."""
    name = re.sub(r"[^a-z0-9._-]+", "-", llm.rstrip("/").split("/")[-1].lower())
    for pattern, replacement in MODEL_ID_PATTERNS.items():
        name = re.sub(pattern, replacement, name)
    return name
