"""What all features, and all neurons, respond to: the catalogues that one pass over text makes."""

from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from sae_lightning.analysis.collect import Reducer, collect, excerpt
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.survey import strengths
from sae_lightning.analysis.survey.copies import find_originals
from sae_lightning.analysis.survey.examples import (
    FiringStatistics,
    StrongestExamples,
    TokenRecorder,
)
from sae_lightning.analysis.survey.intervals import draw_examples
from sae_lightning.analysis.survey.reading import score_token_sets
from sae_lightning.analysis.survey.related import MAX_EXACT_FEATURES, find_neighbours, find_partners
from sae_lightning.analysis.survey.sample import Sample, SequenceSampler
from sae_lightning.analysis.survey.strengths import Positive
from sae_lightning.analysis.survey.telling import rate_telling
from sae_lightning.llm.vocabulary import read_vocabulary
from sae_lightning.report.catalogue import Catalogue
from sae_lightning.report.section import Section
from sae_lightning.scoring.metrics import count_by_density
from sae_lightning.stream.packing import TokenStream
from sae_lightning.terminal import phase

NEURON_ENTRIES = 1 << 23  # of neurons, which are active everywhere, in their sample
EXAMPLES_PER_DRAWN = 6  # an interval has this part of the number of the strongest examples


class Survey(NamedTuple):
    """What one pass over text says about an SAE and about the site that it reads."""

    features: Catalogue
    neurons: Catalogue
    """The site's own dimensions, made positive."""
    sample: Sample
    """A part of the text, with all that fires in it."""

    @property
    def best(self) -> int | None:
        """The most telling feature; None if none has a score."""
        return next(iter(pick_most_telling(self.features, 1)), None)

    def scalars(self) -> dict[str, Any]:
        """The numbers of all features together."""
        features, score = self.features.statistics, self.features.token_sets.score
        known = score[~score.isnan()]
        return {
            "tokens": features.tokens,
            "features": len(features.fired),
            "unfired": (features.fired == 0).float().mean().item(),
            "l0": features.fired.sum().item() / features.tokens,
            "density": count_by_density(features.densities),
            "scored": len(known),
            "score_median": known.median().item() if len(known) else None,
            "score_above_half": (known > 0.5).float().mean().item() if len(known) else None,
        }


def survey(
    subject: Subject,
    source: TokenStream,
    *,
    tokens: int = 131_072,
    examples: int = 12,
    neurons: Positive = Positive.abs,
    batch: int = 16,
    seed: int = 0,
    reducers: Iterable[Reducer] = (),
) -> Survey:
    """Read `tokens` tokens, `batch` sequences at a time, and catalogue what fires where.

    `examples`: how many of the strongest are kept of each unit, and a sixth as many of each
    interval; `reducers` read along.
    """
    d_in, positive = len(subject.sae.W_enc), strengths.NeuronStrengths(neurons)
    kinds = {
        "feature": [
            FiringStatistics(subject.features, strengths.feature_strengths),
            StrongestExamples(subject.features, examples, strengths.feature_strengths),
            SequenceSampler(subject.features, seed),
        ],
        "neuron": [
            FiringStatistics(d_in, positive),
            StrongestExamples(d_in, examples, positive),
            SequenceSampler(d_in, seed, entries=NEURON_ENTRIES, strengths=positive),
        ],
    }
    texts = TokenRecorder()
    text, total = excerpt(source, tokens, batch)
    collect(subject, text, [*chain(*kinds.values()), texts, *reducers], total=total)
    words, read, found = read_vocabulary(subject.llm), texts.result(), []
    with phase("drawing examples"):
        for kind in [*kinds]:
            # what the reducers hold is as large as what they make of it
            statistics, top, sample = (reducer.result() for reducer in kinds.pop(kind))
            spread = draw_examples(
                sample, statistics.maximum, top, max(1, examples // EXAMPLES_PER_DRAWN), seed
            )
            found.append((Catalogue(kind, words, read, statistics, top, spread), sample))
    (features, sample), (of_site, dense) = found
    del found, dense
    with phase("comparing features"):
        scored = score_token_sets(sample, len(words))
        features = features._replace(
            token_sets=scored,
            telling=rate_telling(read, sample, scored, words),
            neighbours=find_neighbours(subject.sae.W_dec),
            partners=find_partners(sample),
        )
        originals = find_originals(subject.sae.W_dec, features.neighbours, rank_units(features))
        features = features._replace(copy_of=originals)
    return Survey(features, of_site, sample)


def make_features_section(survey: Survey) -> Section:
    """How much text was read, and how many features have a pattern in it."""
    said = survey.scalars()
    unscored = said["features"] - said["scored"]
    rows = {
        "text": f"{said['tokens']:,} tokens",
        "features": f"{said['features']:,}, {said['unfired']:.1%} of them silent",
        "L0": f"{said['l0']:.1f} active features per token",
    }
    if said["features"] > MAX_EXACT_FEATURES:
        rows["nearest directions"] = (
            "of so many features those with a cosine above 0.9 are found nearly always, less alike "
            "ones not"
        )
    if said["scored"]:
        rows["token score"] = (
            f"median {said['score_median']:.2f}, above 0.5 for {said['score_above_half']:.0%} of "
            f"{said['scored']:,} features ({unscored:,} fire too rarely for a score)"
        )
    return Section(
        title="Features",
        lead="What each feature fires on. The score says how well the best set of tokens predicts "
        "where a feature fires, on text that the set was not chosen on: 1 is perfect, 0 is chance. "
        "A feature of something more abstract than tokens scores low.",
        rows=rows,
    )


def rank_units(catalogue: Catalogue) -> Tensor:
    """All units, the most telling first."""
    return catalogue.telling.nan_to_num(-1).argsort(descending=True, stable=True)


def pick_most_telling(catalogue: Catalogue, n: int) -> list[int]:
    """The first `n` units of the page's list: no copies, and none without a score."""
    order = rank_units(catalogue)
    order = order[(catalogue.copy_of[order] == order) & (catalogue.telling[order] > 0)]
    return order[:n].tolist()
