"""Prompts that ask a model to explain a feature or to judge an explanation, and parsers of its
answers."""

import re

from sae_lightning.analysis.explain.evidence import Window
from sae_lightning.terminal import make_visible

MARK_THRESHOLD = 0.3  # a token is marked from this share of a text's greatest strength
MAX_EXPLANATION_CHARACTERS = 300
LEGEND = "↵ stands for a line break, ¶ for the beginning or the end of a document."

EXPLAIN = """\
A language model has an internal feature that is active on some tokens of a text and silent on all \
others. Below are pieces of text in which it is active. The tokens on which it is active stand \
between << and >>. The number in front of a text says how strongly, from 1 to 10. {legend}

{texts}

What do the marked tokens, or the words just before them, have in common? It may be a word, a part \
of a word, a meaning, a topic, a grammatical role, a place in the text, or what comes next. Be as \
specific as all the texts allow. Answer with one line of at most 25 words, such as:
Explanation: names of cities, above all after "in"
"""

DETECT = """\
A feature of a language model is active on tokens that this explanation describes:
{explanation}

In which of these pieces of text is it active on at least one token? It may be in all of them, in \
some or in none. {legend}

{texts}

{form}
"""

FUZZ = """\
A feature of a language model is active on tokens that this explanation describes:
{explanation}

In these pieces of text some tokens stand between << and >>. In which of them are these the tokens \
on which it is active? It may be in all of them, in some or in none. {legend}

{texts}

{form}
"""


def write_explain_prompt(shown: list[Window]) -> str:
    """The prompt that asks what the texts have in common."""
    strongest = max(max(window.strengths) for window in shown)
    texts = [
        f"({max(1, round(10 * max(window.strengths) / strongest))}/10) {mark_tokens(window)}"
        for window in shown
    ]
    return EXPLAIN.format(texts="\n".join(texts), legend=LEGEND)


def write_judge_prompt(template: str, explanation: str, texts: list[str]) -> str:
    """The prompt that asks which texts fit the explanation; template: DETECT or FUZZ."""
    numbered = "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))
    form = (
        "Answer with one word, yes or no."
        if len(texts) == 1
        else f"Answer with one line for each of the {len(texts)} texts, its number and yes or no, "
        'such as "1: yes", and nothing else.'
    )
    return template.format(explanation=explanation, texts=numbered, form=form, legend=LEGEND)


def find_firing(window: Window) -> list[int]:
    """Indices of the tokens on which a feature fires strongly enough to be marked."""
    least = MARK_THRESHOLD * max(window.strengths)
    return [i for i, strength in enumerate(window.strengths) if strength > 0 and strength >= least]


def mark_tokens(window: Window, chosen: list[int] | None = None) -> str:
    """The text on one line, with the chosen tokens (by default `find_firing`) in << >>."""
    chosen = find_firing(window) if chosen is None else chosen
    pieces = []
    for i, token in enumerate(window.tokens):
        pieces.append(f"<<{_escape(token)}>>" if i in chosen else _escape(token))
    # merge the marks of neighbours, and move leading spaces out of them
    return re.sub(r"<<( +)", r"\1<<", "".join(pieces).replace(">><<", "")).strip()


def join_tokens(window: Window) -> str:
    """The text on one line, without marks."""
    return "".join(map(_escape, window.tokens)).strip()


def _escape(token: str) -> str:
    """Replace line breaks, and << and >> in the text, by look-alikes."""
    return make_visible(token).replace("<<", "‹‹").replace(">>", "››")


def parse_explanation(answer: str) -> str | None:
    """The explanation in a model's answer; None if it says nothing."""
    answer = _drop_thoughts(answer)
    labelled = re.findall(r"explanation\W*?:[\s*]*(.+)", answer, re.IGNORECASE)
    line = labelled[-1] if labelled else answer.partition("\n")[0]
    return line.strip(" *")[:MAX_EXPLANATION_CHARACTERS] or None


def parse_verdicts(answer: str, texts: int) -> list[bool | None]:
    """A model's verdict on each text: True (yes), False (no), or None if unclear."""
    answer = _drop_thoughts(answer)
    if texts == 1 and (word := re.match(r"\W*(?:1\W+)?(yes|no)\b", answer, re.IGNORECASE)):
        return [word[1].lower() == "yes"]
    verdicts: dict[int, set[bool]] = {}
    pattern = r"^\W*(?:text )?(\d+)(?:\W+\1)?\W+(yes|no)\b"  # small models write 1. 1: yes
    for number, word in re.findall(pattern, answer, re.IGNORECASE | re.MULTILINE):
        verdicts.setdefault(int(number), set()).add(word.lower() == "yes")
    # yes and no for the same text is no verdict
    sets = (verdicts.get(i, set()) for i in range(1, texts + 1))
    return [next(iter(answers)) if len(answers) == 1 else None for answers in sets]


def _drop_thoughts(answer: str) -> str:
    """The answer after a reasoning model's thoughts; empty if they never end."""
    _, end, rest = answer.rpartition("</think>")
    return "" if not end and "<think>" in rest else rest.strip()
