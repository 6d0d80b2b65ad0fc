"""Makes the catalogues of all features and all neurons in one pass over text."""

from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from sae_lightning.analysis.collect import Reducer, collect, excerpt
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.survey.copies import find_originals
from sae_lightning.analysis.survey.examples import (
    FiringStatistics,
    StrongestExamples,
    TokenRecorder,
)
from sae_lightning.analysis.survey.informativeness import rate_informativeness
from sae_lightning.analysis.survey.intervals import draw_examples, estimate_histogram
from sae_lightning.analysis.survey.related import MAX_EXACT_FEATURES, find_neighbours, find_partners
from sae_lightning.analysis.survey.sample import Sample, SequenceSampler
from sae_lightning.analysis.survey.strengths import (
    NeuronStrengthReader,
    Positive,
    read_feature_strengths,
)
from sae_lightning.analysis.survey.token_sets import score_token_sets
from sae_lightning.llm.vocabulary import read_vocabulary
from sae_lightning.report.catalogue import Catalogue
from sae_lightning.report.section import Section
from sae_lightning.sae import SAE
from sae_lightning.scoring.metrics import count_by_density
from sae_lightning.stream.packing import TokenStream
from sae_lightning.terminal import phase

NEURON_ENTRIES = 1 << 23  # limit on strengths in the sample of neurons, which fire on most tokens
TOP_PER_DRAWN = 6  # strongest examples / random examples of each interval


class Survey(NamedTuple):
    """Results of one pass over text, for the SAE's features and the neurons of its source site."""

    features: Catalogue
    neurons: Catalogue
    """Catalogue of the neurons, the dimensions of the source site, made positive."""
    sample: Sample
    """Random sequences of the text, with all features that fire in them."""

    @property
    def best(self) -> int | None:
        """The most informative feature; None if every rating is 0 or NaN."""
        return next(iter(pick_most_informative(self.features, 1)), None)

    def to_dict(self) -> dict[str, Any]:
        """Statistics over all features, as in `features.json`."""
        features, score = self.features.statistics, self.features.token_sets.score
        scores = score[~score.isnan()]
        return {
            "tokens": features.tokens,
            "features": len(features.firing_counts),
            "unfired": (features.firing_counts == 0).float().mean().item(),
            "l0": features.firing_counts.sum().item() / features.tokens,
            "density": count_by_density(features.densities),
            "scored": len(scores),
            "score_median": scores.median().item() if len(scores) else None,
            "score_above_half": (scores > 0.5).float().mean().item() if len(scores) else None,
        }


def survey(
    subject: Subject,
    text: TokenStream,
    *,
    tokens: int = 131_072,
    examples: int = 12,
    neurons: Positive = Positive.abs,
    batch: int = 16,
    seed: int = 0,
    reducers: Iterable[Reducer] = (),
    controls: Iterable[tuple[SAE, Iterable[Reducer]]] = (),
) -> Survey:
    """Read `tokens` tokens of `text`, `batch` sequences at a time, and catalogue where each feature
    and neuron fires.

    `examples`: how many of the strongest to keep for each unit; a sixth as many are drawn at random
    from each interval of strengths. `neurons`: how values of neurons become strengths. Further
    `reducers` take part in the same pass; `controls`: other SAEs with their reducers.
    """
    by_kind, recorder = _make_reducers(subject, examples, neurons, seed), TokenRecorder()
    sequences, total = excerpt(text, tokens, batch)
    reducers = [*chain(*by_kind.values()), recorder, *reducers]
    collect(subject, sequences, reducers, total=total, controls=controls)
    del reducers
    vocabulary, ids = read_vocabulary(subject.llm), recorder.result()
    per_interval, catalogues = max(1, examples // TOP_PER_DRAWN), {}
    with phase("drawing examples"):
        for kind in ("neuron", "feature"):  # features last: their sample is used below
            # popped to free the reducers' state, which is as large as their results
            statistics, top, sample = [reducer.result() for reducer in by_kind.pop(kind)]
            random = draw_examples(sample, statistics.maximum, top, per_interval, seed)
            catalogues[kind] = Catalogue(kind, vocabulary, ids, statistics, top, random)
    with phase("comparing features"):
        features = _complete_catalogue(catalogues["feature"], sample, subject.sae.W_dec)
    return Survey(features, catalogues["neuron"], sample)


def _make_reducers(
    subject: Subject, examples: int, neurons: Positive, seed: int
) -> dict[str, tuple[FiringStatistics, StrongestExamples, SequenceSampler]]:
    """Make the reducers for each kind of unit, 'feature' and 'neuron'."""
    d_in, read_neuron_strengths = len(subject.sae.W_enc), NeuronStrengthReader(neurons)
    return {
        "feature": (
            FiringStatistics(subject.features, read_feature_strengths),
            StrongestExamples(subject.features, examples, read_feature_strengths),
            SequenceSampler(subject.features, seed),
        ),
        "neuron": (
            FiringStatistics(d_in, read_neuron_strengths),
            StrongestExamples(d_in, examples, read_neuron_strengths),
            SequenceSampler(
                d_in, seed, entries=NEURON_ENTRIES, read_strengths=read_neuron_strengths
            ),
        ),
    }


def _complete_catalogue(features: Catalogue, sample: Sample, W_dec: Tensor) -> Catalogue:
    """Add to the features' catalogue: token sets, histograms, how informative each feature is,
    which others are similar to it or fire with it, and whether it is a copy."""
    vocabulary, statistics = features.vocabulary, features.statistics
    token_sets = score_token_sets(sample, len(vocabulary))
    features = features._replace(
        token_sets=token_sets,
        linear_histogram=estimate_histogram(sample, statistics.maximum, statistics.tokens),
        informativeness=rate_informativeness(features.token_ids, sample, token_sets, vocabulary),
        neighbours=find_neighbours(W_dec),
        partners=find_partners(sample),
    )
    originals = find_originals(W_dec, features.neighbours, rank_units(features))
    return features._replace(copy_of=originals)


def make_features_section(result: Survey) -> Section:
    """Summarise how much text was read, and how well token sets predict the features."""
    numbers = result.to_dict()
    unscored = numbers["features"] - numbers["scored"]
    lines = {
        "text": f"{numbers['tokens']:,} tokens",
        "features": f"{numbers['features']:,}, of which {numbers['unfired']:.1%} never fire",
        "L0": f"{numbers['l0']:.1f} active features per token",
    }
    if numbers["features"] > MAX_EXACT_FEATURES:
        lines["nearest directions"] = (
            "with so many features, neighbours with a cosine below 0.9 may be missed"
        )
    if numbers["scored"]:
        lines["token score"] = (
            f"median {numbers['score_median']:.2f}, above 0.5 for "
            f"{numbers['score_above_half']:.0%} of {numbers['scored']:,} features ({unscored:,} "
            "fire too rarely for a score)"
        )
    return Section(
        title="Features",
        lead="What each feature fires on. The score says how well the best set of tokens predicts "
        "where a feature fires, on text that the set was not chosen on: 1 is perfect, 0 is chance. "
        "Features of something more abstract than tokens score low.",
        numbers=lines,
    )


def rank_units(catalogue: Catalogue) -> Tensor:
    """Sort units: indices of all units [units], the most informative first, unrated ones last."""
    return catalogue.informativeness.nan_to_num(-1).argsort(descending=True, stable=True)


def pick_most_informative(catalogue: Catalogue, n: int) -> list[int]:
    """Pick the `n` most informative units that are no copies and have a rating above 0."""
    order = rank_units(catalogue)
    order = order[(catalogue.copy_of[order] == order) & (catalogue.informativeness[order] > 0)]
    return order[:n].tolist()
