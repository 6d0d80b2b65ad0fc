"""Prompts that ask a model to explain a feature or to judge an explanation, and parsers of its
answers."""

import re

from sae_lightning.analysis.explain.evidence import Window
from sae_lightning.terminal import make_visible

MARK_THRESHOLD = 0.3  # least strength of a marked token, over the greatest in its text
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


def write_explain_prompt(windows: list[Window]) -> str:
    """The prompt that asks what the marked tokens of `windows`, in all of which the feature fires,
    have in common."""
    greatest = max(max(window.strengths) for window in windows)
    texts = [
        # at least 1: a 0 would say that the feature is silent
        f"({max(1, round(10 * max(window.strengths) / greatest))}/10) {mark_tokens(window)}"
        for window in windows
    ]
    return EXPLAIN.format(texts="\n".join(texts), legend=LEGEND)


def write_judge_prompt(template: str, explanation: str, texts: list[str]) -> str:
    """The prompt that asks which texts fit the explanation; template: DETECT or FUZZ."""
    numbered = "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))
    answer_form = (
        "Answer with one word, yes or no."
        if len(texts) == 1
        else f"Answer with one line for each of the {len(texts)} texts, its number and yes or no, "
        'such as "1: yes", and nothing else.'
    )
    return template.format(explanation=explanation, texts=numbered, form=answer_form, legend=LEGEND)


def find_marked(window: Window) -> list[int]:
    """Indices of the tokens on which a feature fires strongly enough to be marked; none in a window
    in which it is silent."""
    threshold = MARK_THRESHOLD * max(window.strengths)  # 0 where the feature is silent
    return [
        i for i, strength in enumerate(window.strengths) if strength > 0 and strength >= threshold
    ]


def mark_tokens(window: Window, indices: list[int] | None = None) -> str:
    """The text on one line, with the tokens at `indices` (by default `find_marked`) in << >>."""
    indices = find_marked(window) if indices is None else indices
    marked = []
    for i, token in enumerate(window.tokens):
        marked.append(f"<<{_escape(token)}>>" if i in indices else _escape(token))
    # merge the marks of neighbours, and move leading spaces out of them
    return re.sub(r"<<( +)", r"\1<<", "".join(marked).replace(">><<", "")).strip()


def join_tokens(window: Window) -> str:
    """The text on one line, without marks."""
    return "".join(map(_escape, window.tokens)).strip()


def _escape(token: str) -> str:
    """Make line breaks and control characters visible, and replace << and >> by look-alikes."""
    return make_visible(token).replace("<<", "‹‹").replace(">>", "››")


def parse_explanation(answer: str) -> str | None:
    """The explanation in a model's answer; None if the answer is empty."""
    answer = _drop_thoughts(answer)
    lines = re.findall(r"explanation\W*?:[\s*]*(.+)", answer, re.IGNORECASE)
    line = lines[-1] if lines else answer.partition("\n")[0]
    return line.strip(" *")[:MAX_EXPLANATION_CHARACTERS] or None


def parse_verdicts(answer: str, count: int) -> list[bool | None]:
    """A model's verdicts on `count` texts: True (yes), False (no), or None if unclear."""
    answer = _drop_thoughts(answer)
    if count == 1 and (word := re.match(r"\W*(?:1\W+)?(yes|no)\b", answer, re.IGNORECASE)):
        return [word[1].lower() == "yes"]
    verdicts: dict[int, set[bool]] = {}  # number of a text, from 1 -> what the answer says of it
    pattern = r"^\W*(?:text )?(\d+)(?:\W+\1)?\W+(yes|no)\b"  # small models write "1. 1: yes"
    for number, word in re.findall(pattern, answer, re.IGNORECASE | re.MULTILINE):
        verdicts.setdefault(int(number), set()).add(word.lower() == "yes")
    # a text with both yes and no is unclear
    sets = (verdicts.get(number, set()) for number in range(1, count + 1))
    return [values.pop() if len(values) == 1 else None for values in sets]


def _drop_thoughts(answer: str) -> str:
    """The answer after a reasoning model's thoughts; empty if they never end."""
    if "<think>" in answer and "</think>" not in answer:
        return ""
    return answer.rpartition("</think>")[2].strip()
