"""What `analyze.py` can be asked: the settings that all tasks share, and those of each task.

A task is a preset of the group `task`, so that a setting that another task has is refused.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.stream.text import DataConfig


@dataclass(slots=True, kw_only=True)
class AnalyzeConfig:
    """Which SAE, on which LLM and text."""

    run: str
    """Run folder, a folder with a saved SAE, or for `task=sweep` the folder of a multirun."""
    task: str
    """What to do with it."""
    llm: LLMConfig
    """The LLM, where the folder does not say it or another is wanted."""
    data: DataConfig
    """The text, likewise."""
    layer: LayerConfig
    """The site, likewise."""
    seed: int = 0
    """Fixes the order of the text; a run's own, unless given."""


class Positive(Enum):
    """How a neuron's value, which has a sign, becomes a strength."""

    abs = "abs"
    """Its absolute value."""
    relu = "relu"
    """Its value where it is positive, else 0."""
    shift = "shift"
    """Its value minus the least that it takes on the first tokens, not below 0."""


@dataclass(slots=True, kw_only=True)
class FeaturesConfig(AnalyzeConfig):
    """Examples and statistics of every feature, and of every neuron of the site."""

    tokens: int = 131_072
    """Tokens of text to read."""
    examples: int = 12
    """Strongest examples of a feature; half as many are kept from all over its range."""
    neurons: Positive = Positive.abs
    """How neurons are made positive, to be compared with features."""

    def __post_init__(self):
        at_least("tokens", self.tokens, 1)
        at_least("examples", self.examples, 1)


@dataclass(slots=True, kw_only=True)
class OverviewConfig(FeaturesConfig):
    """Everything that is cheap, and one page to open."""


@dataclass(slots=True, kw_only=True)
class EvaluateConfig(AnalyzeConfig):
    """The held-out scorecard."""

    tokens: int | None = None
    """Held-out tokens; null for as many as the run's own evaluation."""

    def __post_init__(self):
        at_least("tokens", self.tokens, 1)


@dataclass(slots=True, kw_only=True)
class TheoryConfig(AnalyzeConfig):
    """The claims of superposition theory, tested."""

    tokens: int = 65_536
    """Tokens of text to read."""

    def __post_init__(self):
        at_least("tokens", self.tokens, 1024)


@dataclass(slots=True, kw_only=True)
class ProbeConfig(AnalyzeConfig):
    """Do features match abstract ideas better than neurons do?"""

    label: str = "genre"
    """What to tell: genre, play or speaker of the packaged plays, or the name of the column of
    `data` that holds the classes."""
    tokens: int = 131_072
    """Tokens of labelled text to read."""

    def __post_init__(self):
        at_least("tokens", self.tokens, 1024)
        if not self.label:
            raise UserError("label is empty: give genre, play, speaker or the name of a column")


@dataclass(slots=True, kw_only=True)
class LensConfig(AnalyzeConfig):
    """What features say to the output, and what they read at the input."""

    feature: Any = None
    """A feature or a list of them to print; null prints the ones with the sharpest effect."""
    top: int = 10
    """Tokens for each feature."""
    contexts: int = 16
    """Pieces of text in which the features of `feature` are added, to see what they do."""
    direct: bool = False
    """Skip the blocks between the SAE and both ends of the LLM (the logit lens); reads no text."""

    def __post_init__(self):
        self.feature = integers("feature", self.feature)
        at_least("top", self.top, 1)
        at_least("contexts", self.contexts, 1)


class Mode(Enum):
    """What a strength does to the feature."""

    add = "add"
    """It comes on top of the feature's own activation."""
    clamp = "clamp"
    """It takes the place of it: 0 removes the feature."""


@dataclass(slots=True, kw_only=True)
class SteerConfig(AnalyzeConfig):
    """Text that the LLM writes with a feature turned up."""

    feature: Any
    """A feature."""
    strength: Any = None
    """A strength or a list of them, in units of the feature's activation; below 0 suppresses. Null
    for three at which text usually changes and stays fluent."""
    prompt: str = "Once upon a time"
    """What the text begins with."""
    tokens: int = 60
    """Tokens to write."""
    mode: Mode = Mode.add
    """add or clamp: whether a strength is added to the feature's own or takes its place."""
    temperature: float = 0.7
    """How freely the next token is drawn; 0 always takes the likeliest."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability."""

    def __post_init__(self):
        feature = integers("feature", self.feature)
        if feature is None or len(feature) > 1:
            raise UserError(f"feature={_plain(self.feature)}: give one feature, as feature=87")
        (self.feature,) = feature
        self.strength = numbers("strength", self.strength)
        at_least("tokens", self.tokens, 1)
        at_least("temperature", self.temperature, 0)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: a probability; give one above 0, up to 1")


@dataclass(slots=True, kw_only=True)
class ExplainConfig(AnalyzeConfig):
    """Explanations of features in words, and how well they predict firing."""

    feature: Any = None
    """A feature or a list of them; null for `count` random ones."""
    count: int = 10
    """Features to explain where none is named."""
    endpoint: str | None = None
    """Address of a server that speaks OpenAI's API, such as http://localhost:8000/v1; null for a
    model on this machine."""
    explainer: str | None = None
    """The model that explains: its name at the endpoint or, without one, smollm2 (packaged), a
    local folder or a hub name. Null explains nothing and ranks features by their token sets."""
    key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; null sends none."""
    concurrency: int = 8
    """Requests to the endpoint at a time."""
    price_in: float | None = None
    """Price of a million tokens of questions, for the estimate of what it will cost."""
    price_out: float | None = None
    """Price of a million tokens of answers."""
    budget: float | None = None
    """Most that it may cost, in the currency of the prices; null sets no limit."""
    tokens: int = 131_072
    """Tokens of text to read."""
    examples: int = 24
    """Strongest examples of a feature; half as many are kept from all over its range. The explainer
    sees every other one."""
    scored: int = 20
    """Texts in which a feature fires, and as many in which it is silent, to test an explanation."""
    together: int = 5
    """Texts that are judged in one request: the more the cheaper, the fewer the easier; 1 for
    small models."""
    thinking: int = 0
    """Tokens that a reasoning model may spend on each answer before it gives it."""

    def __post_init__(self):
        self.feature = integers("feature", self.feature)
        for name in ("count", "concurrency", "tokens", "together"):
            at_least(name, getattr(self, name), 1)
        for name in ("examples", "scored"):
            at_least(name, getattr(self, name), 8)
        for name in ("price_in", "price_out", "budget", "thinking"):
            at_least(name, getattr(self, name), 0)
        if self.endpoint is not None and self.explainer is None:
            raise UserError(
                f"endpoint={self.endpoint}: give the name of its model too, as explainer=..."
            )
        prices = [self.price_in, self.price_out]
        if prices != [None, None] and (None in prices or self.endpoint is None):
            raise UserError("price_in, price_out: give both, and the endpoint that they are of")
        if self.budget is not None and None in prices:
            raise UserError(
                f"budget={self.budget:g}: needs the endpoint's prices; give price_in and price_out"
            )


@dataclass(slots=True, kw_only=True)
class SweepReportConfig(AnalyzeConfig):
    """The report of a multirun again."""


TASKS: dict[str, type[AnalyzeConfig]] = {
    "overview": OverviewConfig,
    "features": FeaturesConfig,
    "evaluate": EvaluateConfig,
    "theory": TheoryConfig,
    "probe": ProbeConfig,
    "lens": LensConfig,
    "steer": SteerConfig,
    "explain": ExplainConfig,
    "sweep": SweepReportConfig,
}


def at_least(name: str, value: float | None, least: float) -> None:
    """UserError unless `value` is None or at least `least`."""
    if value is not None and value < least:
        raise UserError(f"{name}={value}: give {least} or more")


def integers(name: str, value: Any) -> list[int] | None:
    """A whole number or a list of them as a list; UserError for anything else."""
    values = numbers(name, value)
    if values is not None and any(x != int(x) or x < 0 for x in values):
        raise UserError(f"{name}={_plain(value)}: give whole numbers from 0, such as {name}=[3,7]")
    return values and [int(x) for x in values]


def numbers(name: str, value: Any) -> list[float] | None:
    """A number or a list of them as a list; UserError for anything else."""
    if value is None:
        return None
    values = value if isinstance(value, list | tuple) else [value]
    good = all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in values
    )
    if not good or not values:
        raise UserError(f"{name}={_plain(value)}: give a number, or several as {name}=[1,2]")
    return list(values)


def _plain(value: Any) -> str:
    return str(value).replace(" ", "")
