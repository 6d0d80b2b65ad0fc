"""Sections on explanations of features, and the numbers of `explain.json`."""

from statistics import fmean, stdev
from typing import Any, NamedTuple

from sae_lightning.analysis.explain.answers import Cost
from sae_lightning.analysis.explain.explainer import Explanation, VerdictScore
from sae_lightning.report.catalogue import Catalogue
from sae_lightning.report.section import ColouredText, ResultTable, Section


class Explanations(NamedTuple):
    """Explanations of some features, and what they cost."""

    explanations: list[Explanation]
    spent: Cost
    model: str
    """The setting `explainer`."""

    def to_dict(self) -> dict[str, Any]:
        """The content of `explain.json`, by key."""
        return {
            "model": self.model,
            "detection": _average(self.explanations, "detection"),
            "fuzzing": _average(self.explanations, "fuzzing"),
            **self.spent._asdict(),
            "explanations": [
                {key: value for key, value in explanation._asdict().items() if key != "examples"}
                for explanation in self.explanations
            ],
        }


def make_explanation_section(result: Explanations) -> Section:
    """Show the explanations with their scores, each beside a text in which its feature fires."""
    explanations, spent, model = result
    explained = [explanation for explanation in explanations if explanation.text]
    numbers = {
        "detection": _summarise(explained, "detection"),
        "fuzzing": _summarise(explained, "fuzzing"),
        "cost": f"{spent.requests:,} requests to {model}, {spent.tokens_in:,} tokens in and "
        f"{spent.tokens_out:,} out; the other answers came from the cache",
    }
    scores = [score for each in explained for score in (each.detection, each.fuzzing) if score]
    if malformed := sum(score.malformed for score in scores):
        numbers["not understood"] = f"the verdicts on {malformed:,} texts, which are left out"
    return Section(
        title="Explanations",
        lead="What features fire on, in the words of a language model. Detection: from the words "
        "alone, does a text that the model has not seen activate the feature? Fuzzing: does "
        "it fire on the marked tokens? Balanced accuracy: 1 is perfect, 0.5 is chance.",
        numbers=numbers,
        table=ResultTable(
            ["explanation", "detection", "fuzzing", "texts"], [*map(_make_row, explanations)]
        ),
        texts=[
            ColouredText(
                f"{explanation.feature}: {explanation.text}",
                list(window.tokens),
                list(window.strengths),
            )
            for explanation in explained
            for window in explanation.examples[:1]
        ],
    )


def make_token_set_section(catalogue: Catalogue, features: list[int]) -> Section:
    """Show the token set that best predicts each feature, for a command that names no model."""
    token_sets = catalogue.token_sets
    rows = []
    for feature in sorted(features, key=lambda i: -token_sets.score[i].nan_to_num(-1)):
        score = token_sets.score[feature]
        tokens = [catalogue.vocabulary[t] for t in token_sets.tokens[feature].tolist() if t >= 0]
        listed = ("after " if token_sets.previous[feature] else "") + " ".join(map(repr, tokens))
        if score.isnan():
            rows.append([f"{feature}: fires too rarely for a score", "–"])
        else:
            rows.append([f"{feature}: {listed}", f"{score:.2f}"])
    return Section(
        title="Explanations",
        lead="No model was named to put features into words. Instead, this is how well the best "
        "set of tokens predicts where each feature fires (1 is perfect, 0 is chance). For "
        "explanations give explainer=smollm2 (packaged, but weak), another folder or hub name, or "
        "endpoint=http://localhost:8000/v1 explainer=NAME for any server that speaks OpenAI's API.",
        table=ResultTable(["tokens", "score"], rows),
    )


def _make_row(explanation: Explanation) -> list[str]:
    text, scores = explanation.text, [explanation.detection, explanation.fuzzing]
    if not text and explanation.shown:
        text = "(no explanation: fires too rarely, or the model gave none)"
    verdicts = ["–" if score is None else str(score.yes + score.no) for score in scores]
    return [
        f"{explanation.feature}: {text or '(never fires)'}",
        *("–" if s is None or s.accuracy is None else f"{s.accuracy:.2f}" for s in scores),
        " + ".join(verdicts) if any(scores) else "–",  # texts on which the scores are based
    ]


def _list_accuracies(explanations: list[Explanation], test: str) -> list[float]:
    scores: list[VerdictScore | None] = [getattr(explanation, test) for explanation in explanations]
    return [s.accuracy for s in scores if s is not None and s.accuracy is not None]


def _average(explanations: list[Explanation], test: str) -> float | None:
    accuracies = _list_accuracies(explanations, test)
    return fmean(accuracies) if accuracies else None


def _summarise(explanations: list[Explanation], test: str) -> str:
    """Format the mean over features, with its standard error if there are several."""
    accuracies = _list_accuracies(explanations, test)
    if not accuracies:
        return "no verdicts"
    error = f" ± {stdev(accuracies) / len(accuracies) ** 0.5:.2f}" if len(accuracies) > 1 else ""
    return (
        f"{fmean(accuracies):.2f}{error} on average over {len(accuracies)} features (0.5 is chance)"
    )
