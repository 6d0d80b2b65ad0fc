"""Features put into words by a language model, and how well the words predict firing.

    half of the examples -> model -> "names of cities" ─┐
    other texts ────────────────────────────────────────┴-> model -> yes / no -> accuracy

(Bills et al. 2023, Language models can explain neurons in language models)

Two tests (Paulo et al. 2024, Automatically Interpreting Millions of Features in Large Language
Models):

    detection   does the feature fire in this text?      texts in which it fires, and silent ones
    fuzzing     does it fire on the marked tokens?       texts in which it fires, each once with the
                                                         right tokens marked, once with wrong ones
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
    """Number of verdicts, right or wrong, where the truth is yes."""
    no: int
    """Number of verdicts where the truth is no."""
    malformed: int
    """Number of texts whose verdict could not be parsed; they are in no other field."""


class Explanation(NamedTuple):
    """An explanation of a feature, and how well it predicts where the feature fires."""

    feature: int
    text: str | None
    """None if there were too few texts to ask for one, or the model gave none."""
    shown: int
    """Number of texts for the explainer; 0 if the feature never fires."""
    detection: VerdictScore | None
    """None without an explanation, and if the feature is never silent."""
    fuzzing: VerdictScore | None
    """None without an explanation, and if no text has enough silent tokens to mark."""
    examples: list[Window]
    """The first three of the texts for the explainer, or fewer."""


class Trial(NamedTuple):
    """One test question about some texts, and the right answers."""

    template: str
    """The prompt: DETECT or FUZZ."""
    texts: list[str]
    truths: list[bool]
    """Whether the right answer is yes, for each text."""


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
        explanations: dict[int, str | None] = {}
        longest = "x" * prompts.MAX_EXPLANATION_CHARACTERS  # if the explanation is not cached
        for feature, question in questions.items():
            reply = self.answers.read_cached(question)
            explanations[feature] = prompts.parse_explanation(reply.text) if reply else longest
        tests = [question for _, _, question in self._make_tests(all_evidence, explanations)]
        missing = [
            question
            for question in dict.fromkeys([*questions.values(), *tests])  # each once
            if self.answers.read_cached(question) is None
        ]
        return Cost(
            len(missing),
            sum(len(question.text) // CHARACTERS_PER_TOKEN + SPARE_TOKENS for question in missing),
            sum(question.tokens for question in missing),
        )

    def explain_features(self, all_evidence: list[Evidence]) -> list[Explanation]:
        """Explain each feature that has enough evidence, and score the explanations. UserError if
        the model stops answering; its answers until then are cached for the next call."""
        questions = self._make_questions(all_evidence)
        with phase("explaining features", total=len(questions)) as advance:
            answers = self.answers.ask([*questions.values()], advance)
        explanations = dict(zip(questions, map(prompts.parse_explanation, answers), strict=True))
        tests = self._make_tests(all_evidence, explanations)
        with phase("testing explanations", total=len(tests)) as advance:
            answers = self.answers.ask([question for _, _, question in tests], advance)
        # feature, template -> truths and verdicts of all its trials
        results: dict[tuple[int, str], tuple[list[bool], list[bool | None]]] = {}
        for (feature, trial, _), answer in zip(tests, answers, strict=True):
            truths, verdicts = results.setdefault((feature, trial.template), ([], []))
            truths += trial.truths
            verdicts += prompts.parse_verdicts(answer, len(trial.texts))
        scores = {key: score_verdicts(*pair) for key, pair in results.items()}
        return [
            Explanation(
                feature=evidence.feature,
                text=explanations.get(evidence.feature),
                shown=len(evidence.shown),
                detection=scores.get((evidence.feature, DETECT)),
                fuzzing=scores.get((evidence.feature, FUZZ)),
                examples=evidence.shown[:3],
            )
            for evidence in all_evidence
        ]

    def _make_questions(self, all_evidence: list[Evidence]) -> dict[int, Question]:
        """Feature -> the question that asks for its explanation, for features with enough
        evidence."""
        tokens = EXPLANATION_TOKENS + self.thinking
        return {
            evidence.feature: Question(prompts.write_explain_prompt(evidence.shown), tokens)
            for evidence in all_evidence
            if evidence.is_enough
        }

    def _make_tests(
        self, all_evidence: list[Evidence], explanations: dict[int, str | None]
    ) -> list[tuple[int, Trial, Question]]:
        """The feature, trial and question of each test of the explanations {feature: text}."""
        tests = []
        for evidence in all_evidence:
            if explanation := explanations.get(evidence.feature):
                trials = make_fuzzing_trials(evidence, self.together, self.seed)
                if evidence.silent:  # else "yes" would be right for every text
                    trials = make_detection_trials(evidence, self.together, self.seed) + trials
                for trial in trials:
                    tokens = VERDICT_TOKENS * len(trial.texts) + SPARE_TOKENS + self.thinking
                    prompt = prompts.write_judge_prompt(trial.template, explanation, trial.texts)
                    tests.append((evidence.feature, trial, Question(prompt, tokens)))
        return tests


def make_detection_trials(evidence: Evidence, together: int, seed: int = 0) -> list[Trial]:
    """Trials on at most `together` texts each; the texts are in random order."""
    pairs = [(prompts.join_tokens(window), True) for window in evidence.firing]
    pairs += [(prompts.join_tokens(window), False) for window in evidence.silent]
    random.Random(f"{seed} detection {evidence.feature}").shuffle(pairs)
    return _make_trials(DETECT, pairs, together)


def make_fuzzing_trials(evidence: Evidence, together: int, seed: int = 0) -> list[Trial]:
    """Trials on at most `together` texts each. No trial has both versions of a text, because their
    difference would give the answer away. A text with fewer silent tokens than marked ones is left
    out, because its wrong version could not have as many marks."""
    rng = random.Random(f"{seed} fuzzing {evidence.feature}")
    versions = []  # pairs: a text with the right tokens marked, and with wrong ones
    for window in evidence.firing:
        silent = [
            i
            for i, strength in enumerate(window.strengths)
            if strength == 0 and window.tokens[i] != DOCUMENT_MARK
        ]
        count = len(prompts.find_marked(window))
        if count <= len(silent):
            decoys = sorted(rng.sample(silent, count))
            versions.append((prompts.mark_tokens(window), prompts.mark_tokens(window, decoys)))
    rng.shuffle(versions)
    trials = []
    # each turn has one version of every text: the right one of every other text
    for turn in (0, 1):
        pairs = [
            (right, True) if i % 2 == turn else (wrong, False)
            for i, (right, wrong) in enumerate(versions)
        ]
        rng.shuffle(pairs)
        trials += _make_trials(FUZZ, pairs, together)
    return trials


def _make_trials(template: str, pairs: list[tuple[str, bool]], together: int) -> list[Trial]:
    """Put pairs (text, truth) into trials of at most `together` texts."""
    trials = []
    for start in range(0, len(pairs), together):
        texts, truths = zip(*pairs[start : start + together], strict=True)
        trials.append(Trial(template, list(texts), list(truths)))
    return trials


def score_verdicts(truths: list[bool], verdicts: list[bool | None]) -> VerdictScore:
    """Compare `verdicts` (None: malformed) with the `truths`, in the same order."""
    # truth -> whether each verdict on a text with that truth is right
    is_right: dict[bool, list[bool]] = {True: [], False: []}
    for truth, verdict in zip(truths, verdicts, strict=True):
        if verdict is not None:
            is_right[truth].append(verdict == truth)
    rates = [sum(outcomes) / len(outcomes) for outcomes in is_right.values() if outcomes]
    return VerdictScore(
        accuracy=math.fsum(rates) / 2 if len(rates) == 2 else None,
        yes=len(is_right[True]),
        no=len(is_right[False]),
        malformed=verdicts.count(None),
    )
