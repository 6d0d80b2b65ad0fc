"""The claim that one feature stands for one concept.

StrengthCounts -> detect_concepts() -> compare_units() -> make_concept_section()
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Generator, Tensor

from sae_lightning.analysis.collect import EncodedBatch
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.theory.detection import (
    Detector,
    FeatureCounts,
    StrengthCounts,
    find_detector,
)
from sae_lightning.analysis.theory.token_concepts import CONCEPTS, tag_tokens
from sae_lightning.llm.vocabulary import find_special_ids, read_vocabulary
from sae_lightning.report.figures import COLOURS, GREY, make_figure
from sae_lightning.report.section import ResultTable, Section

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MIN_OCCURRENCES = 20  # tokens of a concept in each half; with fewer, scores mean little


class ConceptDetectors(NamedTuple):
    """A concept, and the single units that detect it best."""

    concept: str
    share: float
    """Share of tokens that belong to the concept, in the half that is scored."""
    feature: Detector
    neuron: Detector
    """The best of the site's dimensions, in either direction."""
    few: Detector
    """The best of 2 d random features, as few as neurons have directions; d = number of neurons."""


class ConceptCounts:
    """Reducer that counts the strengths of features on the tokens of each concept."""

    def __init__(self, subject: Subject, features: int):
        self.words = read_words(subject)
        self.counts = FeatureCounts(len(CONCEPTS), features, subject.device)

    @torch.no_grad()
    def add(self, batch: EncodedBatch) -> None:
        values, units = batch.active_features
        self.counts.add(values[batch.keep], *tag_batch(batch, self.words), units)


def read_words(subject: Subject) -> list[str]:
    """Text of each token id; a space for special tokens, which are no part of the text."""
    words = read_vocabulary(subject.llm)
    for special in find_special_ids(subject.llm.tokenizer):
        words[special] = " "
    return words


def tag_batch(batch: EncodedBatch, words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The concepts of each kept token, bool [n, concepts], and the half of the text that it is in,
    0 or 1 [n]."""
    keep = batch.keep
    member = torch.stack([tag_tokens([words[i] for i in row]) for row in batch.tokens.tolist()])
    half = (batch.sequence_indices.to(keep.device) % 2)[:, None].expand_as(keep)[keep]
    return member.to(keep.device)[keep], half


def find_frequent_concepts(counts: StrengthCounts) -> dict[str, int]:
    """Concepts that are frequent enough in both halves -> their index, in order."""
    tokens = counts.token_counts
    return {name: i for i, name in enumerate(CONCEPTS) if tokens[:, i].min() >= MIN_OCCURRENCES}


def detect_concepts(features: StrengthCounts, neurons: StrengthCounts) -> list[ConceptDetectors]:
    """The best units for each concept that is frequent enough, the most frequent first."""
    tokens, units, d = features.token_counts, features.counts.shape[2], neurons.counts.shape[2]
    subset = torch.randperm(units, generator=Generator().manual_seed(0))[: 2 * d]
    detected = [
        ConceptDetectors(
            concept=name,
            share=(tokens[1, i] / tokens[1, -1]).item(),
            feature=find_detector(features, i),
            neuron=find_detector(neurons, i),
            few=find_detector(features, i, subset),
        )
        for name, i in find_frequent_concepts(features).items()
    ]
    return sorted(detected, key=lambda best: -best.share)


def compare_units(detected: list[ConceptDetectors]) -> dict[str, Any]:
    """Mean scores over concepts of the best feature, neuron, and one of 2 d random features."""
    means = {
        f"{kind}_{score}": sum(getattr(getattr(best, kind), score) for best in detected)
        / max(1, len(detected))
        for kind in ("feature", "neuron", "few")
        for score in ("f1", "auroc")
    }
    wins = sum(best.feature.f1 > best.neuron.f1 for best in detected)
    return {"concepts": len(detected), "feature_wins": wins, **means, "each": detected}


def make_concept_section(numbers: dict[str, Any]) -> Section:
    """Whether single features stand for concepts better than single neurons do."""
    title, detected = "One feature, one concept", numbers["each"]
    n = numbers["concepts"]
    if not n:
        return Section(title, "No concept of the lists is frequent enough in this text.")
    feature, neuron = numbers["feature_f1"], numbers["neuron_f1"]
    auroc, neuron_auroc = numbers["feature_auroc"], numbers["neuron_auroc"]
    comparison = "better than" if feature > neuron else "no better than"
    aurocs = f"(AUROC {auroc:.2f} against {neuron_auroc:.2f})"
    if auroc > neuron_auroc:
        ranking = f"Features also rank tokens better {aurocs}."
    else:
        why = "a feature does not rank the tokens on which it is silent"
        ranking = f"Features do not rank tokens better {aurocs}: {why}."
    always_yes = sum(2 * best.share / (1 + best.share) for best in detected) / n
    return Section(
        title=title,
        lead=f"The best single feature detects a concept with a mean F1 of {feature:.2f}, "
        f"{comparison} the best single neuron with {neuron:.2f}; the feature wins on "
        f"{numbers['feature_wins']} of {n} concepts. {ranking}",
        rows={
            "mean F1": f"{feature:.3f} feature, {neuron:.3f} neuron; {always_yes:.3f} by always "
            "saying yes",
            "few features": f"{numbers['few_f1']:.3f}, the best of a random choice of "
            "features, as many as neurons have directions",
            "mean AUROC": f"{auroc:.3f} feature, {neuron_auroc:.3f} neuron, each of the unit that "
            "ranks best",
            "how": "unit and threshold are chosen on one half of the sequences and scored on the "
            "other",
        },
        table=_make_concepts_table(detected),
        figures={"F1 of the best single unit": _draw_units(detected)},
    )


def _make_concepts_table(detected: list[ConceptDetectors]) -> ResultTable:
    header = ["concept", "tokens", "feature", "F1", "AUROC", "neuron", "F1", "AUROC"]
    rows = [
        [best.concept, f"{best.share:.1%}", f"{best.feature.unit}"]
        + [f"{best.feature.f1:.3f}", f"{best.feature.auroc:.3f}", _name_neuron(best)]
        + [f"{best.neuron.f1:.3f}", f"{best.neuron.auroc:.3f}"]
        for best in sorted(detected, key=lambda best: -best.feature.f1)
    ]
    return ResultTable(header, rows)


def _name_neuron(best: ConceptDetectors) -> str:
    return f"{'-' if best.neuron.below else '+'}{best.neuron.unit}"


def _draw_units(detected: list[ConceptDetectors]) -> "Figure":
    figure = make_figure("F1 of the best neuron", "F1 of the best feature")
    figure.update_xaxes(range=[0, 1.02]).update_yaxes(range=[0, 1.02])
    figure.add_scatter(
        name="equally good",
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        line={"color": GREY, "dash": "dot"},
        hoverinfo="skip",
    )
    return figure.add_scatter(
        x=[best.neuron.f1 for best in detected],
        y=[best.feature.f1 for best in detected],
        mode="markers+text",
        text=_pick_labels(detected),
        textposition="middle right",
        textfont_size=11,
        cliponaxis=False,
        hovertext=[
            f"{best.concept}<br>feature {best.feature.unit}: F1 {best.feature.f1:.3f}<br>"
            f"neuron {_name_neuron(best)}: F1 {best.neuron.f1:.3f}"
            for best in detected
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        marker={"size": 8, "color": COLOURS[0]},
        showlegend=False,
    )


def _pick_labels(detected: list[ConceptDetectors]) -> list[str]:
    """Label of each point; "" where it would cover an earlier label."""
    placed: list[ConceptDetectors] = []
    for best in detected:
        if all(
            abs(best.feature.f1 - other.feature.f1) > 0.03
            or abs(best.neuron.f1 - other.neuron.f1) > 0.2
            for other in placed
        ):
            placed.append(best)
    return [best.concept if best in placed else "" for best in detected]
