"""What all features, and all neurons, respond to: the catalogues that one pass over text makes."""

from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch

from sae_lightning.analysis.collect import Reducer, collect, excerpt
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.survey import strengths
from sae_lightning.analysis.survey.examples import Counting, Gathering
from sae_lightning.analysis.survey.reading import reading
from sae_lightning.analysis.survey.related import neighbours, partners
from sae_lightning.analysis.survey.sample import Sample, Sampling
from sae_lightning.analysis.survey.strengths import Positive
from sae_lightning.llm.vocabulary import vocabulary
from sae_lightning.report.catalogue import Catalogue
from sae_lightning.report.section import Section
from sae_lightning.scoring.metrics import density_histogram
from sae_lightning.stream.packing import TokenSource
from sae_lightning.terminal import phase

WORDS = 3  # different ones that make a unit worth showing


class Survey(NamedTuple):
    """What one pass over text says about an SAE and about the site that it reads."""

    features: Catalogue
    neurons: Catalogue
    """The site's own dimensions, made positive."""
    sample: Sample
    """A part of the text, with all that fires in it."""

    @property
    def best(self) -> int | None:
        """The feature that a set of several words predicts best."""
        return next(iter(best_read(self.features, 1)), None)

    def scalars(self) -> dict[str, Any]:
        """The numbers of all features together."""
        features, score = self.features.statistics, self.features.reading.score
        known = score[~score.isnan()]
        return {
            "tokens": features.tokens,
            "features": len(features.fired),
            "unfired": (features.fired == 0).float().mean().item(),
            "l0": features.fired.sum().item() / features.tokens,
            "density": density_histogram(features.density),
            "scored": len(known),
            "score_median": known.median().item() if len(known) else None,
            "score_above_half": (known > 0.5).float().mean().item() if len(known) else None,
        }


def survey(
    subject: Subject,
    source: TokenSource,
    *,
    tokens: int = 131_072,
    examples: int = 12,
    neurons: Positive = Positive.abs,
    batch: int = 16,
    seed: int = 0,
    reducers: Iterable[Reducer] = (),
) -> Survey:
    """Read `tokens` tokens, `batch` sequences at a time, and catalogue what fires where.

    `examples`: how many of the strongest are kept of each unit, and half as many random ones;
    `reducers` read along.
    """
    kinds = {
        kind: [
            Counting(units, values),
            Gathering(units, examples, values),
            Gathering(units, max(1, examples // 2), values, seed),
        ]
        for kind, units, values in (
            ("feature", subject.features, strengths.features),
            ("neuron", len(subject.sae.W_enc), strengths.Neurons(neurons)),
        )
    }
    sampling = Sampling(subject.features, seed)
    text, total = excerpt(source, tokens, batch)
    collect(subject, text, [*chain(*kinds.values()), sampling, *reducers], total=total)
    words, sample = vocabulary(subject.llm), sampling.result()
    features, of_site = (
        Catalogue(kind, words, *(reducer.result() for reducer in mine))
        for kind, mine in kinds.items()
    )
    with phase("comparing features"):
        features = features._replace(
            reading=reading(sample, len(words)),
            neighbours=neighbours(subject.sae.W_dec),
            partners=partners(sample),
        )
    return Survey(features, of_site, sample)


def section(survey: Survey) -> Section:
    """How much text was read, and how many features have a pattern in it."""
    said = survey.scalars()
    unscored = said["features"] - said["scored"]
    rows = {
        "text": f"{said['tokens']:,} tokens",
        "features": f"{said['features']:,}, {said['unfired']:.1%} of them silent",
        "L0": f"{said['l0']:.1f} active features per token",
    }
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


def best_read(catalogue: Catalogue, n: int) -> list[int]:
    """The `n` units that token sets of several words predict best, each set only once."""
    score, sets = catalogue.reading.score.nan_to_num(-1), catalogue.reading.tokens.tolist()
    found, seen = [], set()
    for unit in torch.argsort(score, descending=True).tolist():
        if len(found) == n or score[unit] <= 0:
            break
        pieces = (catalogue.vocabulary[i].strip().lower() for i in sets[unit] if i >= 0)
        words = {piece for piece in pieces if piece.isalpha() and len(piece) > 1}
        # a unit of one word, or of line breaks, shows nothing of what features are
        if len(words) >= WORDS and not words & seen:
            seen |= words
            found.append(unit)
    return found
