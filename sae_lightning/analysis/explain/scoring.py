"""Does an explanation predict where a feature fires? Two tests for a model that knows no more.

detection   does this text activate the feature?     texts in which it fires, and silent ones
fuzzing     are the marked tokens those that do?     texts in which it fires, each once marked
                                                     rightly and once elsewhere
(Paulo et al. 2024, Automatically Interpreting Millions of Features in Large Language Models)
"""

import math
import random
from typing import NamedTuple

from sae_lightning.analysis.explain.evidence import MARK, Evidence, Window
from sae_lightning.analysis.explain.prompts import DETECT, FUZZ, fires, judge, marked, plain


class Trial(NamedTuple):
    """One question about some texts, and the right answers."""

    task: str
    """DETECT or FUZZ."""
    texts: list[str]
    truths: list[bool]

    def question(self, explanation: str) -> str:
        """What the scorer is asked."""
        return judge(self.task, explanation, self.texts)


class Score(NamedTuple):
    """How well verdicts agree with the truth."""

    accuracy: float | None
    """Balanced: mean of the share of right ones where the truth is yes and where it is no; 0.5 is
    chance; None if one of them has no verdict."""
    yes: int
    """Verdicts where the truth is yes."""
    no: int
    """Verdicts where the truth is no."""
    malformed: int
    """Texts without a verdict that could be understood: left out, not guessed."""


def detection(evidence: Evidence, together: int, seed: int = 0) -> list[Trial]:
    """Trials on at most `together` texts each, in random order."""
    items = [(plain(window), True) for window in evidence.firing]
    items += [(plain(window), False) for window in evidence.silent]
    random.Random(f"{seed} detection {evidence.feature}").shuffle(items)
    return _trials(DETECT, items, together)


def fuzzing(evidence: Evidence, together: int, seed: int = 0) -> list[Trial]:
    """Trials on at most `together` texts each; no trial holds both versions of a text, whose
    difference would give the answer away."""
    chance = random.Random(f"{seed} fuzzing {evidence.feature}")
    pairs = []
    for window in evidence.firing:
        decoy = _decoy(window, chance)
        if decoy:
            pairs.append((marked(window), marked(window, decoy)))
    chance.shuffle(pairs)
    trials = []
    for turn in (0, 1):
        items = [(pair[(i + turn) % 2], (i + turn) % 2 == 0) for i, pair in enumerate(pairs)]
        chance.shuffle(items)
        trials += _trials(FUZZ, items, together)
    return trials


def _decoy(window: Window, chance: random.Random) -> list[int] | None:
    """As many tokens as fire, of those that do not at all; None where there are not enough."""
    silent = [
        i
        for i, (token, strength) in enumerate(zip(*window, strict=True))
        if strength == 0 and token != MARK
    ]
    wanted = len(fires(window))
    return sorted(chance.sample(silent, wanted)) if wanted <= len(silent) else None


def _trials(task: str, items: list[tuple[str, bool]], together: int) -> list[Trial]:
    parts = [items[i : i + together] for i in range(0, len(items), together)]
    return [Trial(task, *map(list, zip(*part, strict=True))) for part in parts]


def score(truths: list[bool], verdicts: list[bool | None]) -> Score:
    """Balanced accuracy of the verdicts, None where there is none."""
    right: dict[bool, list[bool]] = {True: [], False: []}
    for truth, verdict in zip(truths, verdicts, strict=True):
        if verdict is not None:
            right[truth].append(verdict == truth)
    rates = [sum(group) / len(group) for group in right.values() if group]
    return Score(
        accuracy=math.fsum(rates) / 2 if len(rates) == 2 else None,
        yes=len(right[True]),
        no=len(right[False]),
        malformed=verdicts.count(None),
    )
