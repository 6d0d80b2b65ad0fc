"""Features put into words by a language model, and how well the words predict firing.

    half of the examples -> explainer -> "names of cities" ─┐
    other texts, in which it fires or is silent ────────────┴-> scorer -> yes / no -> accuracy

(Bills et al. 2023, Language models can explain neurons in language models)

Two tests (Paulo et al. 2024, Automatically Interpreting Millions of Features in Large Language
Models):

detection   does this text activate the feature?     texts in which it fires, and silent ones
fuzzing     does it fire on the marked tokens?       texts in which it fires, each once marked
                                                     correctly and once on other tokens
"""

import math
import random
from typing import NamedTuple

from sae_lightning.analysis.explain import prompts
from sae_lightning.analysis.explain.answers import Answers, Cost
from sae_lightning.analysis.explain.evidence import DOCUMENT_MARK, Evidence, Window
from sae_lightning.analysis.explain.models import Question
from sae_lightning.analysis.explain.prompts import DETECT, FUZZ
from sae_lightning.terminal import phase

EXPLANATION_TOKENS = 80  # longest explanation
VERDICT_TOKENS = 8  # longest verdict on one text
SPARE_TOKENS = 16  # added to each request: chat template, and room in the answer
CHARACTERS_PER_TOKEN = 3  # low for most text, so that cost estimates err on the high side


class VerdictScore(NamedTuple):
    """How well verdicts agree with the truth."""

    accuracy: float | None
    """Balanced accuracy, the mean of true-positive and true-negative rate; 0.5 is chance; None if
    there are no verdicts for one of the rates."""
    yes: int
    """Verdicts where the truth is yes."""
    no: int
    """Verdicts where the truth is no."""
    malformed: int
    """Texts whose verdict could not be parsed: left out, not guessed."""


class Explanation(NamedTuple):
    """An explanation of a feature, and how well it predicts where the feature fires."""

    feature: int
    text: str | None
    """None if it fires too rarely, or the explainer said nothing."""
    shown: int
    """Texts that the explainer saw."""
    detection: VerdictScore | None
    """None without an explanation, and if the feature is never silent."""
    fuzzing: VerdictScore | None
    """None without an explanation, and if no text has enough silent tokens to mark."""
    examples: list[Window]
    """Some of the texts that the explainer saw."""


class Trial(NamedTuple):
    """One question about some texts, and the right answers."""

    template: str
    """DETECT or FUZZ."""
    texts: list[str]
    truths: list[bool]


class Explainer:
    """Explains features and scores the explanations, all with one model.

    together: texts that are judged in one request; more are cheaper, fewer are easier.
    thinking: tokens that a reasoning model may spend on its thoughts before each answer.
    """

    def __init__(self, answers: Answers, *, together: int = 5, thinking: int = 0, seed: int = 0):
        self.answers, self.together, self.thinking = answers, together, thinking
        self.seed = seed

    def estimate_cost(self, all_evidence: list[Evidence]) -> Cost:
        """Estimate the cost of `explain_features`, on the high side: tokens in from the number of
        characters, tokens out from the longest answer that is allowed."""
        questions = self._make_questions(all_evidence)
        texts: dict[int, str | None] = {}
        for feature, question in questions.items():
            reply = self.answers.read_cached(question)
            texts[feature] = (
                prompts.parse_explanation(reply.text)
                if reply
                else "x" * prompts.MAX_EXPLANATION_CHARACTERS
            )
        tests = [question for *_, question in self._make_tests(all_evidence, texts)]
        missing = [
            question
            for question in dict.fromkeys([*questions.values(), *tests])
            if self.answers.read_cached(question) is None
        ]
        return Cost(
            len(missing),
            sum(len(question.text) // CHARACTERS_PER_TOKEN + SPARE_TOKENS for question in missing),
            sum(question.tokens for question in missing),
        )

    def explain_features(self, all_evidence: list[Evidence]) -> list[Explanation]:
        """Explain each feature that has enough examples, and score the explanations.

        UserError if the model stops answering; its answers so far are cached for the next call.
        """
        questions = self._make_questions(all_evidence)
        with phase("explaining features", total=len(questions)) as advance:
            answers = self.answers.ask([*questions.values()], advance)
        texts = dict(zip(questions, map(prompts.parse_explanation, answers), strict=True))
        tests = self._make_tests(all_evidence, texts)
        with phase("testing explanations", total=len(tests)) as advance:
            answers = self.answers.ask([question for *_, question in tests], advance)
        judged: dict[tuple[int, str], tuple[list, list]] = {}
        for (feature, trial, _), answer in zip(tests, answers, strict=True):
            truths, verdicts = judged.setdefault((feature, trial.template), ([], []))
            truths += trial.truths
            verdicts += prompts.parse_verdicts(answer, len(trial.texts))
        scores = {key: score_verdicts(*pair) for key, pair in judged.items()}
        return [
            Explanation(
                feature=evidence.feature,
                text=texts.get(evidence.feature),
                shown=len(evidence.shown),
                detection=scores.get((evidence.feature, DETECT)),
                fuzzing=scores.get((evidence.feature, FUZZ)),
                examples=evidence.shown[:3],
            )
            for evidence in all_evidence
        ]

    def _make_questions(self, all_evidence: list[Evidence]) -> dict[int, Question]:
        """Feature -> the question that asks for its explanation, if there is enough evidence."""
        tokens = EXPLANATION_TOKENS + self.thinking
        return {
            evidence.feature: Question(prompts.write_explain_prompt(evidence.shown), tokens)
            for evidence in all_evidence
            if evidence.is_enough
        }

    def _make_tests(
        self, all_evidence: list[Evidence], texts: dict[int, str | None]
    ) -> list[tuple[int, Trial, Question]]:
        """Trials of the explanations `texts` {feature: text}, each with its question."""
        tests = []
        for evidence in all_evidence:
            if text := texts.get(evidence.feature):
                trials = make_fuzzing_trials(evidence, self.together, self.seed)
                if evidence.silent:  # otherwise there is nothing to tell apart
                    trials = make_detection_trials(evidence, self.together, self.seed) + trials
                for trial in trials:
                    tokens = VERDICT_TOKENS * len(trial.texts) + SPARE_TOKENS + self.thinking
                    question = Question(
                        prompts.write_judge_prompt(trial.template, text, trial.texts), tokens
                    )
                    tests.append((evidence.feature, trial, question))
        return tests


def make_detection_trials(evidence: Evidence, together: int, seed: int = 0) -> list[Trial]:
    """Trials on at most `together` texts each, in random order."""
    items = [(prompts.join_tokens(window), True) for window in evidence.firing]
    items += [(prompts.join_tokens(window), False) for window in evidence.silent]
    random.Random(f"{seed} detection {evidence.feature}").shuffle(items)
    return _make_trials(DETECT, items, together)


def make_fuzzing_trials(evidence: Evidence, together: int, seed: int = 0) -> list[Trial]:
    """Trials on at most `together` texts each; no trial holds both versions of a text, whose
    difference would give the answer away."""
    rng = random.Random(f"{seed} fuzzing {evidence.feature}")
    pairs = []
    for window in evidence.firing:
        silent = [
            i
            for i, (token, strength) in enumerate(zip(*window, strict=True))
            if strength == 0 and token != DOCUMENT_MARK
        ]
        count = len(prompts.find_firing(window))
        if count <= len(silent):
            decoy = sorted(rng.sample(silent, count))
            pairs.append((prompts.mark_tokens(window), prompts.mark_tokens(window, decoy)))
    rng.shuffle(pairs)
    trials = []
    for turn in (0, 1):
        items = [(pair[(i + turn) % 2], (i + turn) % 2 == 0) for i, pair in enumerate(pairs)]
        rng.shuffle(items)
        trials += _make_trials(FUZZ, items, together)
    return trials


def _make_trials(template: str, items: list[tuple[str, bool]], together: int) -> list[Trial]:
    parts = [items[i : i + together] for i in range(0, len(items), together)]
    return [Trial(template, *map(list, zip(*part, strict=True))) for part in parts]


def score_verdicts(truths: list[bool], verdicts: list[bool | None]) -> VerdictScore:
    """Compare `verdicts` (None: malformed) with the `truths`, in the same order."""
    right: dict[bool, list[bool]] = {True: [], False: []}
    for truth, verdict in zip(truths, verdicts, strict=True):
        if verdict is not None:
            right[truth].append(verdict == truth)
    rates = [sum(group) / len(group) for group in right.values() if group]
    return VerdictScore(
        accuracy=math.fsum(rates) / 2 if len(rates) == 2 else None,
        yes=len(right[True]),
        no=len(right[False]),
        malformed=verdicts.count(None),
    )
