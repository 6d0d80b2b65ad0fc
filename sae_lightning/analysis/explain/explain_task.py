"""`task=explain`: a language model puts features into words."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sae_lightning.analysis.explain.answers import Answers
from sae_lightning.analysis.explain.evidence import MIN_TEXTS, gather, pick_features
from sae_lightning.analysis.explain.explainer import Explainer
from sae_lightning.analysis.explain.explanation_sections import (
    Explanations,
    make_explanation_section,
    make_token_set_section,
)
from sae_lightning.analysis.explain.models import open_model
from sae_lightning.analysis.survey.survey import survey
from sae_lightning.analysis.task import Task, check_at_least, parse_integers
from sae_lightning.errors import UserError
from sae_lightning.llm.vocabulary import find_special_ids
from sae_lightning.terminal import console


@dataclass(slots=True, kw_only=True)
class ExplainTask(Task):
    """Explanations of features in words, and how well they predict firing."""

    feature: Any = None
    """A feature or a list of them; null for `count` random ones."""
    count: int = 10
    """How many random features to explain if `feature` is null."""
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
    budget: int | None = None
    """Most tokens that questions and answers may take together; null sets no limit."""
    tokens: int = 131_072
    """Tokens of text to read."""
    examples: int = 24
    """Strongest examples of a feature to collect. In addition, a sixth as many are drawn at random
    from each of five equal intervals of its strength. The explainer sees every other example."""
    scored: int = 20
    """An explanation is tested on at most this number of texts in which the feature fires, and as
    many in which it is silent."""
    together: int = 5
    """Texts that are judged in one request: more are cheaper, fewer are easier; 1 for small
    models."""
    thinking: int = 0
    """Tokens that a reasoning model may spend on its thoughts before each answer."""

    def __post_init__(self):
        self.feature = parse_integers("feature", self.feature)
        for name in ("count", "concurrency", "tokens", "together"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("examples", "scored"):
            check_at_least(name, getattr(self, name), 2 * MIN_TEXTS)
        for name in ("budget", "thinking"):
            check_at_least(name, getattr(self, name), 0)
        if self.endpoint is not None and self.explainer is None:
            raise UserError(
                f"endpoint={self.endpoint}: give the name of its model too, as explainer=..."
            )

    def execute(self, given_settings: Collection[str]) -> None:
        subject = self.load_subject(given_settings)
        named = subject.check_features(self.feature) if self.feature else None
        first = named[0] if named else None  # the page suggests commands for it
        model = open_model(self.endpoint, self.explainer, self.key_env, self.concurrency)
        answers = Answers(model) if model else None
        if answers:
            answers.check_model()  # before any text is read
        text, batch, seed = subject.corpus.train, subject.config.llm.batch, subject.config.seed
        surveyed = survey(
            subject, text, tokens=self.tokens, examples=self.examples, batch=batch, seed=seed
        )
        features = named or pick_features(surveyed.features, self.count, seed)
        if answers is None:
            section = make_token_set_section(surveyed.features, features)
            self.print_and_write(subject, section.table._asdict(), [section], feature=first)
            return
        special = find_special_ids(subject.llm.tokenizer)
        evidence = gather(
            surveyed.features,
            surveyed.sample,
            features,
            scored=self.scored,
            special=special,
            seed=seed,
        )
        explainer = Explainer(answers, together=self.together, thinking=self.thinking, seed=seed)
        cost = explainer.estimate_cost(evidence)
        console.print(str(cost))
        cost.check_budget(self.budget)
        result = Explanations(explainer.explain_features(evidence), answers.spent, self.explainer)
        self.print_and_write(
            subject, result.to_dict(), [make_explanation_section(result)], feature=first
        )
