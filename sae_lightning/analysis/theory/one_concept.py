"""The claim that one feature stands for one concept.

StrengthCounts -> detect_concepts() -> ConceptDetectors -> compare_units() -> numbers
                                                        -> make_concept_section()
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
    """The single units that detect one concept best."""

    concept: str
    share: float
    """Share of tokens that belong to the concept, in the half on which units are scored."""
    feature: Detector
    neuron: Detector
    """The best of the site's dimensions, in either direction."""
    subset_feature: Detector
    """The best of a random subset of 2 d features, because d neurons have 2 d directions."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as `theory.json` has them, where `subset_feature` is called `few`."""
        return {
            "concept": self.concept,
            "share": self.share,
            "feature": self.feature.to_dict(),
            "neuron": self.neuron.to_dict(),
            "few": self.subset_feature.to_dict(),
        }


class ConceptCounts:
    """Reducer that counts the strengths of features on the tokens of each concept."""

    def __init__(self, subject: Subject, features: int):
        self.vocabulary = read_blanked_vocabulary(subject)
        self.counts = FeatureCounts(len(CONCEPTS), features, subject.device)

    @torch.no_grad()
    def add(self, batch: EncodedBatch) -> None:
        strengths, active = batch.active_features
        is_member, half = tag_batch(batch, self.vocabulary)
        self.counts.add(strengths[batch.keep], is_member, half, active)


def read_blanked_vocabulary(subject: Subject) -> list[str]:
    """Text of each token id; a space for special tokens, which are not part of the text."""
    vocabulary = read_vocabulary(subject.llm)
    for special in find_special_ids(subject.llm.tokenizer):
        vocabulary[special] = " "
    return vocabulary


def tag_batch(batch: EncodedBatch, vocabulary: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tell of each kept token whether it belongs to each concept, bool [n, concepts], and which
    half of the sequences it is in, 0 (even indices) or 1 (odd indices) [n]."""
    keep = batch.keep
    is_member = torch.stack(
        [tag_tokens([vocabulary[i] for i in ids]) for ids in batch.tokens.tolist()]
    )
    half = (batch.sequence_indices.to(keep.device) % 2)[:, None].expand_as(keep)[keep]
    return is_member.to(keep.device)[keep], half


def find_frequent_concepts(counts: StrengthCounts) -> dict[str, int]:
    """Concepts that are frequent enough in both halves -> index in CONCEPTS."""
    tokens = counts.tokens
    return {name: i for i, name in enumerate(CONCEPTS) if tokens[:, i].min() >= MIN_OCCURRENCES}


def detect_concepts(features: StrengthCounts, neurons: StrengthCounts) -> list[ConceptDetectors]:
    """The best units for each concept that is frequent enough, the most frequent first."""
    tokens, d = features.tokens, len(neurons.thresholds)
    order = torch.randperm(len(features.thresholds), generator=Generator().manual_seed(0))
    detectors = [
        ConceptDetectors(
            concept=name,
            share=(tokens[1, i] / tokens[1, -1]).item(),  # in half 1; -1: all tokens
            feature=find_detector(features, i),
            neuron=find_detector(neurons, i),
            subset_feature=find_detector(features, i, order[: 2 * d]),
        )
        for name, i in find_frequent_concepts(features).items()
    ]
    return sorted(detectors, key=lambda best: -best.share)


def compare_units(detectors: list[ConceptDetectors]) -> dict[str, Any]:
    """Mean scores over concepts (0 without concepts) of the best feature, the best neuron and the
    best feature in the random subset; also all scores of each concept."""
    each = [best.to_dict() for best in detectors]
    means = {
        f"{kind}_{score}": sum(best[kind][score] for best in each) / max(1, len(each))
        for kind in ("feature", "neuron", "few")
        for score in ("f1", "auroc")
    }
    wins = sum(best.feature.f1 > best.neuron.f1 for best in detectors)
    return {"concepts": len(each), "feature_wins": wins, **means, "each": each}


def make_concept_section(numbers: dict[str, Any], detectors: list[ConceptDetectors]) -> Section:
    """Say whether single features stand for concepts better than single neurons do. numbers: those
    that `compare_units` returns."""
    title, n = "One feature, one concept", len(detectors)
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
    # saying yes on every token has a recall of 1 and a precision of `share`
    always_yes = sum(2 * best.share / (1 + best.share) for best in detectors) / n
    return Section(
        title=title,
        lead=f"The best single feature detects a concept with a mean F1 of {feature:.2f}, "
        f"{comparison} the best single neuron with {neuron:.2f}; the feature wins on "
        f"{numbers['feature_wins']} of {n} concepts. {ranking}",
        numbers={
            "mean F1": f"{feature:.3f} feature, {neuron:.3f} neuron; {always_yes:.3f} by always "
            "saying yes",
            "subset of features": f"{numbers['few_f1']:.3f}, the best of a random "
            "subset, of as many features as neurons have directions",
            "mean AUROC": f"{auroc:.3f} feature, {neuron_auroc:.3f} neuron, each of the unit that "
            "ranks best",
            "how": "unit and threshold are chosen on one half of the sequences and scored on the "
            "other",
        },
        table=_make_concepts_table(detectors),
        figures={"F1 of the best single unit": _draw_units(detectors)},
    )


def _make_concepts_table(detectors: list[ConceptDetectors]) -> ResultTable:
    header = ["concept", "tokens", "feature", "F1", "AUROC", "neuron", "F1", "AUROC"]
    rows = [
        [best.concept, f"{best.share:.1%}", f"{best.feature.unit}"]
        + [f"{best.feature.f1:.3f}", f"{best.feature.auroc:.3f}", _name_neuron(best)]
        + [f"{best.neuron.f1:.3f}", f"{best.neuron.auroc:.3f}"]
        for best in sorted(detectors, key=lambda best: -best.feature.f1)
    ]
    return ResultTable(header, rows)


def _name_neuron(best: ConceptDetectors) -> str:
    return f"{'-' if best.neuron.below else '+'}{best.neuron.unit}"


def _draw_units(detectors: list[ConceptDetectors]) -> "Figure":
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
        x=[best.neuron.f1 for best in detectors],
        y=[best.feature.f1 for best in detectors],
        mode="markers+text",
        text=_pick_labels(detectors),
        textposition="middle right",
        textfont_size=11,
        cliponaxis=False,
        hovertext=[
            f"{best.concept}<br>feature {best.feature.unit}: F1 {best.feature.f1:.3f}<br>"
            f"neuron {_name_neuron(best)}: F1 {best.neuron.f1:.3f}"
            for best in detectors
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        marker={"size": 8, "color": COLOURS[0]},
        showlegend=False,
    )


def _pick_labels(detectors: list[ConceptDetectors]) -> list[str]:
    """The label of each point; empty where it would cover the label of an earlier point."""
    placed: list[ConceptDetectors] = []
    for best in detectors:
        if all(
            abs(best.feature.f1 - other.feature.f1) > 0.03
            or abs(best.neuron.f1 - other.neuron.f1) > 0.2
            for other in placed
        ):
            placed.append(best)
    return [best.concept if best in placed else "" for best in detectors]
