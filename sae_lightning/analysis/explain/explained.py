"""Features in words, for people and for `explain.json`."""

from statistics import fmean, stdev
from typing import Any, NamedTuple

from sae_lightning.analysis.explain.answers import Cost
from sae_lightning.analysis.explain.explainer import Explanation, VerdictScore
from sae_lightning.report.catalogue import Catalogue
from sae_lightning.report.section import ColouredText, ResultTable, Section


class Explanations(NamedTuple):
    """Explanations of some features, and what they took."""

    explanations: list[Explanation]
    spent: Cost
    model: str

    def scalars(self) -> dict[str, Any]:
        """What `explain.json` holds."""
        return {
            "model": self.model,
            "detection": _average(self.explanations, "detection"),
            "fuzzing": _average(self.explanations, "fuzzing"),
            **self.spent._asdict(),
            "explanations": [
                {key: value for key, value in each._asdict().items() if key != "examples"}
                for each in self.explanations
            ],
        }


def make_explanation_section(result: Explanations) -> Section:
    explanations, spent, model = result
    explained = [each for each in explanations if each.text]
    rows = {
        "detection": _summarise(explained, "detection"),
        "fuzzing": _summarise(explained, "fuzzing"),
        "asked": f"{spent.requests:,} requests to {model}, {spent.tokens_in:,} tokens in and "
        f"{spent.tokens_out:,} out; the rest was answered in the cache",
    }
    malformed = sum(s.malformed for each in explained for s in (each.detection, each.fuzzing) if s)
    if malformed:
        rows["not understood"] = f"the verdicts on {malformed:,} texts; they are left out"
    return Section(
        title="Explanations",
        lead="What features fire on, in the words of a language model. Detection: from the words "
        "alone, does a text that the model has not seen activate the feature? Fuzzing: are the "
        "marked tokens those that do? Balanced accuracy: 1 is perfect, 0.5 is chance.",
        rows=rows,
        table=ResultTable(
            ["explanation", "detection", "fuzzing", "texts"], [*map(_make_row, explanations)]
        ),
        texts=[
            ColouredText(
                f"{each.feature}: {each.text}", list(window.tokens), list(window.strengths)
            )
            for each in explained
            for window in each.examples[:1]
        ],
    )


def make_token_set_section(catalogue: Catalogue, features: list[int]) -> Section:
    """What can be said of features where there is no model to ask: their best token sets."""
    reading = catalogue.token_sets
    rows = []
    for feature in sorted(features, key=lambda f: -reading.score[f].nan_to_num(-1)):
        score = reading.score[feature]
        tokens = [catalogue.vocabulary[t] for t in reading.tokens[feature].tolist() if t >= 0]
        words = ("after " if reading.previous[feature] else "") + " ".join(map(repr, tokens))
        rows.append(
            [f"{feature}: fires too rarely to say", "–"]
            if score.isnan()
            else [f"{feature}: {words}", f"{score:.2f}"]
        )
    return Section(
        title="Explanations",
        lead="No model was named that could put features into words, so that this is only how well "
        "the best set of tokens predicts where each fires (1 is perfect, 0 is chance). For "
        "explanations give explainer=smollm2 (packaged, but weak), another folder or hub name, or "
        "endpoint=http://localhost:8000/v1 explainer=NAME for any server that speaks OpenAI's API.",
        table=ResultTable(["tokens", "score"], rows),
    )


def _make_row(explanation: Explanation) -> list[str]:
    feature, text, shown, *scores, _ = explanation
    if not text:
        rare = "(no explanation: fires too rarely, or nothing was said)"
        text = rare if shown else "(never fires)"
    # how many verdicts the scores rest on
    verdicts = ["–" if score is None else str(score.yes + score.no) for score in scores]
    return [
        f"{feature}: {text}",
        *("–" if s is None or s.accuracy is None else f"{s.accuracy:.2f}" for s in scores),
        " + ".join(verdicts) if any(scores) else "–",
    ]


def _list_accuracies(explanations: list[Explanation], test: str) -> list[float]:
    scores: list[VerdictScore | None] = [getattr(each, test) for each in explanations]
    return [s.accuracy for s in scores if s is not None and s.accuracy is not None]


def _average(explanations: list[Explanation], test: str) -> float | None:
    found = _list_accuracies(explanations, test)
    return fmean(found) if found else None


def _summarise(explanations: list[Explanation], test: str) -> str:
    """The mean over features with its standard error."""
    found = _list_accuracies(explanations, test)
    if not found:
        return "no verdicts"
    error = f" ± {stdev(found) / len(found) ** 0.5:.2f}" if len(found) > 1 else ""
    return f"{fmean(found):.2f}{error} on average over {len(found)} features (0.5 is chance)"
