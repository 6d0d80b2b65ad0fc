"""Features in words: which model is asked, and what people see of its explanations."""

from statistics import stdev
from typing import Any, NamedTuple

from sae_lightning.analysis.explain.answers import Answerer, Local, Spent
from sae_lightning.analysis.explain.endpoint import CUSTOMARY_KEY, Endpoint
from sae_lightning.analysis.explain.explainer import Explanation
from sae_lightning.analysis.explain.scoring import Score
from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLM, LLMConfig, load
from sae_lightning.report.catalogue import Catalogue
from sae_lightning.report.section import Coloured, Section, Table


class Explained(NamedTuple):
    """Explanations of some features, and what they took."""

    explanations: list[Explanation]
    spent: Spent
    model: str
    """The one that was asked."""

    def scalars(self) -> dict[str, Any]:
        """What `explain.json` holds."""
        return {
            "model": self.model,
            "detection": _mean(self.explanations, "detection"),
            "fuzzing": _mean(self.explanations, "fuzzing"),
            **self.spent._asdict(),
            "explanations": [
                {
                    "feature": each.feature,
                    "text": each.text,
                    "shown": each.shown,
                    "detection": each.detection and each.detection._asdict(),
                    "fuzzing": each.fuzzing and each.fuzzing._asdict(),
                }
                for each in self.explanations
            ],
        }


def open_model(
    endpoint: str | None,
    model: str | None,
    key_env: str | None = CUSTOMARY_KEY,
    concurrency: int = 8,
    *,
    llm: LLM | None = None,
) -> Answerer | None:
    """The model at an endpoint, or a local one (`llm`, if that is the one); None if none is named.

    UserError if the address makes no sense or the local model cannot be loaded.
    """
    if model is None:
        return None
    if endpoint is not None:
        return Endpoint(endpoint, model, key_env, concurrency=concurrency)
    if llm is not None and llm.name == model:
        return Local(llm)
    try:
        return Local(load(LLMConfig(name=model)))
    except UserError as error:
        raise UserError(str(error).replace("llm.name=", "explainer=")) from error


def section(result: Explained) -> Section:
    """The explanations for people."""
    explanations, spent, model = result
    explained = [each for each in explanations if each.text]
    rows = {
        "detection": _summary(explained, "detection"),
        "fuzzing": _summary(explained, "fuzzing"),
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
        table=Table(
            ["explanation", "detection", "fuzzing", "texts"],
            [
                [
                    f"{each.feature}: {each.text or _why_not(each)}",
                    _written(each.detection),
                    _written(each.fuzzing),
                    _number(each),
                ]
                for each in explanations
            ],
        ),
        texts=[
            Coloured(f"{each.feature}: {each.text}", list(window.tokens), list(window.strengths))
            for each in explained
            for window in each.examples[:1]
        ],
    )


def without_model(catalogue: Catalogue, features: list[int]) -> Section:
    """What can be said of features where there is no model to ask: their best token sets."""
    reading = catalogue.reading
    ranked = sorted(features, key=lambda f: reading.score[f].nan_to_num(-1), reverse=True)
    rows = []
    for feature in ranked:
        tokens = [catalogue.vocabulary[t] for t in reading.tokens[feature].tolist() if t >= 0]
        words = ("after " if reading.previous[feature] else "") + " ".join(map(repr, tokens))
        known = not reading.score[feature].isnan()
        rows.append(
            [f"{feature}: {words if known else 'fires too rarely to say'}"]
            + [f"{reading.score[feature]:.2f}" if known else "–"]
        )
    return Section(
        title="Explanations",
        lead="No model was named that could put features into words, so that this is only how well "
        "the best set of tokens predicts where each fires (1 is perfect, 0 is chance). For "
        "explanations give explainer=smollm2 (packaged, but weak), another folder or hub name, or "
        "endpoint=http://localhost:8000/v1 explainer=NAME for any server that speaks OpenAI's API.",
        table=Table(["tokens", "score"], rows),
    )


def _why_not(explanation: Explanation) -> str:
    few = explanation.detection is None and explanation.shown == 0
    return "(never fires)" if few else "(no explanation: fires too rarely, or nothing was said)"


def _written(score: Score | None) -> str:
    return "–" if score is None or score.accuracy is None else f"{score.accuracy:.2f}"


def _number(explanation: Explanation) -> str:
    """How many verdicts the two scores rest on."""
    scores = explanation.detection, explanation.fuzzing
    if scores == (None, None):
        return "–"
    return " + ".join("–" if s is None else str(s.yes + s.no) for s in scores)


def _accuracies(explanations: list[Explanation], test: str) -> list[float]:
    scores = [getattr(each, test) for each in explanations]
    return [s.accuracy for s in scores if s is not None and s.accuracy is not None]


def _mean(explanations: list[Explanation], test: str) -> float | None:
    found = _accuracies(explanations, test)
    return sum(found) / len(found) if found else None


def _summary(explanations: list[Explanation], test: str) -> str:
    """The mean over features with its standard error."""
    found = _accuracies(explanations, test)
    if not found:
        return "no verdicts"
    error = f" ± {stdev(found) / len(found) ** 0.5:.2f}" if len(found) > 1 else ""
    mean = f"{_mean(explanations, test):.2f}{error}"
    return f"{mean} on average over {len(found)} features (0.5 is chance)"
