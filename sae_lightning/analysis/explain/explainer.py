"""Features put into words by a language model, and how well the words predict firing.

    half of the examples -> explainer -> "names of cities" ─┐
    other texts, in which it fires or is silent ────────────┴-> scorer -> yes / no -> accuracy

(Bills et al. 2023, Language models can explain neurons in language models; the two tests of
scoring.py are those of Paulo et al. 2024)
"""

from collections.abc import Iterator
from typing import NamedTuple

from sae_lightning.analysis.explain import prompts
from sae_lightning.analysis.explain.answers import Answers, Question
from sae_lightning.analysis.explain.evidence import Evidence, Window
from sae_lightning.analysis.explain.scoring import Score, Trial, detection, fuzzing, score
from sae_lightning.errors import UserError
from sae_lightning.terminal import phase

EXPLANATION, VERDICT, ROOM = 80, 8, 16  # tokens of an explanation, of a verdict, and on top of them
CHARACTERS = 3  # a token, in estimates: fewer than most text has, so that they err on the high side


class Explanation(NamedTuple):
    """What a feature seems to be about, and whether that predicts where it fires."""

    feature: int
    text: str | None
    """None where it fires too rarely, or the explainer said nothing."""
    shown: int
    """Texts that the explainer saw."""
    detection: Score | None
    """Does a text activate it? None without an explanation, and where it is never silent."""
    fuzzing: Score | None
    """Are the marked tokens those that do? None likewise."""
    examples: list[Window]
    """Some of the texts that the explainer saw."""


class Estimate(NamedTuple):
    """What explaining will cost, at most."""

    requests: int
    """Questions that are not answered in the cache."""
    tokens_in: int
    """About."""
    tokens_out: int
    """If every answer is as long as it may be."""
    money: float | None
    """In the currency of the prices; None without prices."""

    def __str__(self) -> str:
        if not self.requests:
            return "every answer is in the cache: nothing to pay"
        money = "" if self.money is None else f": {self.money:,.2f} at the given prices"
        return (
            f"{self.requests:,} requests, up to {self.tokens_in:,} tokens in and "
            f"{self.tokens_out:,} out{money}"
        )

    def within(self, budget: float | None) -> None:
        """UserError if it may cost more."""
        if budget is not None and self.money is not None and self.money > budget:
            raise UserError(
                f"budget={budget:g}: this may cost {self.money:,.2f} ({self}); explain fewer "
                "features, lower scored, or raise the budget"
            )


class Explainer:
    """Explains features and scores the explanations, all with one model.

    together: texts that are judged in one request; the more the cheaper, the fewer the easier.
    thinking: tokens that a reasoning model may spend on each answer before it gives it.
    """

    def __init__(self, answers: Answers, *, together: int = 5, thinking: int = 0, seed: int = 0):
        self.answers, self.together, self.thinking = answers, together, thinking
        self.seed = seed

    def estimate(
        self,
        evidence: list[Evidence],
        price_in: float | None = None,
        price_out: float | None = None,
    ) -> Estimate:
        """What is left to pay for; prices are for a million tokens."""
        longest = "x" * prompts.LONGEST
        todo: dict[Question, None] = {}
        for each in filter(lambda each: each.enough, evidence):
            known = self.answers.known(self._asks(each))
            todo[self._asks(each)] = None
            text = prompts.explanation(known.text) if known else longest
            if text:
                todo |= dict.fromkeys(self._tests(trial, text) for trial in self._trials(each))
        open_ones = [question for question in todo if self.answers.known(question) is None]
        tokens_in = sum(len(question.text) // CHARACTERS + ROOM for question in open_ones)
        tokens_out = sum(question.tokens for question in open_ones)
        prices = None not in (price_in, price_out)
        money = (tokens_in * price_in + tokens_out * price_out) / 1e6 if prices else None
        return Estimate(len(open_ones), tokens_in, tokens_out, money)

    def explain(self, evidence: list[Evidence]) -> list[Explanation]:
        """An explanation of each feature with its scores; ones without enough examples have none.

        UserError if the model stops answering: what it has answered is kept for the next call.
        """
        able = [each for each in evidence if each.enough]
        with phase("explaining features", total=len(able)) as advance:
            answers = self.answers.ask([self._asks(each) for each in able], advance)
        texts = {
            each.feature: prompts.explanation(answer)
            for each, answer in zip(able, answers, strict=True)
        }
        asked = [
            (each.feature, trial, text)
            for each in able
            if (text := texts[each.feature])
            for trial in self._trials(each)
        ]
        with phase("testing explanations", total=len(asked)) as advance:
            questions = [self._tests(trial, text) for _, trial, text in asked]
            answers = self.answers.ask(questions, advance)
        judged: dict[tuple[int, str], tuple[list, list]] = {}
        for (feature, trial, _), answer in zip(asked, answers, strict=True):
            truths, verdicts = judged.setdefault((feature, trial.task), ([], []))
            truths += trial.truths
            verdicts += prompts.verdicts(answer, len(trial.texts))
        scores = {key: score(*each) for key, each in judged.items()}
        return [
            Explanation(
                feature=each.feature,
                text=texts.get(each.feature),
                shown=len(each.shown),
                detection=scores.get((each.feature, prompts.DETECT)),
                fuzzing=scores.get((each.feature, prompts.FUZZ)),
                examples=each.shown[:3],
            )
            for each in evidence
        ]

    def _asks(self, evidence: Evidence) -> Question:
        return Question(prompts.explain(evidence.shown), EXPLANATION + self.thinking)

    def _tests(self, trial: Trial, text: str) -> Question:
        tokens = VERDICT * len(trial.texts) + ROOM + self.thinking
        return Question(trial.question(text), tokens)

    def _trials(self, evidence: Evidence) -> Iterator[Trial]:
        # without silent texts there is nothing to tell apart
        if evidence.silent:
            yield from detection(evidence, self.together, self.seed)
        yield from fuzzing(evidence, self.together, self.seed)
