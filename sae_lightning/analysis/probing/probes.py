"""Do features match abstract ideas better than neurons do?

    labelled pieces -> LLM -> site ----------> mean over tokens -> neurons   [pieces, d]
                               └-> SAE ------> mean over tokens -> features  [pieces, features]

k-sparse probing (Gurnee et al. 2023, 2305.01610): how well do k units predict a class? Units are
features, neurons (dimensions of the activation) or random directions. There are as many random
directions as features: they show how much is gained by having that many units to choose from.
"""

from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from sae_lightning.analysis.collect import EncodedBatch, collect
from sae_lightning.analysis.probing.labelled_text import LabelledText
from sae_lightning.analysis.probing.linear import FoldScore, FoldSplit
from sae_lightning.analysis.subject import Subject
from sae_lightning.sae import SAE
from sae_lightning.terminal import phase

FEATURES, NEURONS, RANDOM = "features", "neurons", "random directions"
CONTROL_K = (1, 5)  # values of k in a comparison with controls


class ProbeScore(NamedTuple):
    """Scores of probes on k units of one kind."""

    kind: str
    """The kind of units: features, neurons or random directions; for the features of a control, the
    control's name."""
    k: int | None
    """Units for each class; None for all."""
    fold_scores: list[FoldScore]
    """Score on each fold, of probes that were fitted on the other folds."""

    @property
    def accuracy(self) -> float:
        """Mean accuracy over tested folds."""
        return fmean(fold.accuracy for fold in self.fold_scores)

    @property
    def auroc(self) -> float:
        """Mean AUROC over tested folds."""
        return fmean(fold.auroc for fold in self.fold_scores)

    def to_dict(self) -> dict[str, Any]:
        """The fields and the means, by the keys that `probe.json` has for them."""
        return {
            "units": self.kind,
            "k": self.k,
            "folds": self.fold_scores,
            "accuracy": self.accuracy,
            "auroc": self.auroc,
        }


class BestUnit(NamedTuple):
    """The single unit that best separates a class from all others."""

    unit: int
    """The unit that was chosen most often."""
    folds: int
    """Number of folds for which it was chosen."""
    auroc: float
    """Mean AUROC over tested folds, each with the unit that was chosen for it."""


class Probes(NamedTuple):
    """How well the units of each kind predict one label."""

    label: str
    classes: list[str]
    pieces: list[int]
    """Number of pieces of text of each class."""
    context: int
    """Limit on the tokens of a piece, BOS included."""
    notes: list[str]
    """Caveats that a reader of the scores should know."""
    scores: list[ProbeScore]
    """One for each kind of units and each k."""
    best_units: dict[str, list[BestUnit]]
    """Kind of units (features or neurons) -> the best unit of each class."""
    controls: list[ProbeScore] = []
    """Scores of the features of controls; empty without controls."""

    @property
    def majority(self) -> float:
        """Accuracy of always saying the most frequent class."""
        return max(self.pieces) / sum(self.pieces)

    def find_score(self, kind: str, k: int | None) -> ProbeScore | None:
        """The score of probes on k units (None: all) of a kind; None if it was not measured."""
        scores = [*self.scores, *self.controls]
        return next((s for s in scores if (s.kind, s.k) == (kind, k)), None)

    def to_dict(self) -> dict[str, Any]:
        """The content of `probe.json`, by key; there, `best_units` is called `matches`."""
        return {
            "label": self.label,
            "classes": self.classes,
            "pieces": dict(zip(self.classes, self.pieces, strict=True)),
            "context": self.context,
            "notes": self.notes,
            "scores": [score.to_dict() for score in self.scores],
            "matches": {
                kind: dict(zip(self.classes, best_units, strict=True))
                for kind, best_units in self.best_units.items()
            },
            "controls": [score.to_dict() for score in self.controls],
            "majority": self.majority,
        }


class PieceMeans:
    """Reducer that averages activations and features over the tokens of each piece of text. Each
    sequence is a piece; pieces come in order."""

    def __init__(self, pieces: int, features: int) -> None:
        self._pieces, self._features, self._filled = pieces, features, 0
        self._means: dict[str, Tensor] = {}

    def add(self, batch: EncodedBatch) -> None:
        keep = batch.keep[..., None]
        count = keep.sum(1).clamp(min=1)  # a piece without kept tokens has means of 0
        strengths, active = batch.active_features
        features = strengths.new_zeros(*batch.keep.shape, self._features)
        features[..., active] = strengths
        means = {FEATURES: features.sum(1) / count, NEURONS: (batch.x * keep).sum(1) / count}
        end = self._filled + len(count)
        for kind, part in means.items():
            # one large tensor: small ones, kept from each batch, would fragment memory
            if kind not in self._means:
                self._means[kind] = torch.empty(self._pieces, part.shape[1])
            self._means[kind][self._filled : end] = part
        self._filled = end

    def result(self) -> dict[str, Tensor]:
        """Mean strengths of features [pieces, features] and of neurons [pieces, d], float32."""
        return self._means


def probe(
    subject: Subject,
    text: LabelledText,
    *,
    k: tuple[int, ...] = (1, 2, 5, 16),
    batch: int = 16,
    controls: Mapping[str, SAE] = {},
) -> Probes:
    """Read labelled text, `batch` pieces at a time. For each n in `k`, fit probes on the n best
    units of each kind; also fit probes on all features and on all neurons. `controls`: other SAEs
    of the same site; their probes read CONTROL_K features."""
    pieces, progress = len(text.tokens), "reading labelled text"
    reducer = PieceMeans(pieces, subject.features)
    control_reducers = {
        name: PieceMeans(pieces, sae.config.features) for name, sae in controls.items()
    }
    pairs = [(sae, [control_reducers[name]]) for name, sae in controls.items()]
    batches = text.split_batches(batch)
    collect(subject, batches, [reducer], total=pieces, label=progress, controls=pairs)
    result, control_scores = fit_probes(reducer.result(), text, k=k), []
    del reducer  # large
    for name, control_reducer in control_reducers.items():
        with phase(f"fitting probes on {name}"):
            features = control_reducer.result()[FEATURES].numpy()
            by_size, _ = _fit_folds(features, text, [*CONTROL_K])
        control_scores += [ProbeScore(name, size, scores) for size, scores in by_size.items()]
    return result._replace(controls=control_scores)


def fit_probes(
    means: dict[str, Tensor], text: LabelledText, *, k: tuple[int, ...] = (1, 2, 5, 16)
) -> Probes:
    """Fit and test probes on features, on neurons and on random directions. means: FEATURES and
    NEURONS -> means over each piece [pieces, units]."""
    from sklearn.preprocessing import StandardScaler

    representations = {kind: x.numpy() for kind, x in means.items()}
    # standardised, so that large neurons do not dominate the random directions
    neurons = StandardScaler().fit_transform(representations[NEURONS])
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(neurons.shape[1], means[FEATURES].shape[1], generator=generator)
    representations[RANDOM] = neurons @ directions.numpy()
    scores, best_units = [], {}
    with phase("fitting probes", total=len(representations)) as advance:
        for kind, x in representations.items():
            sizes: list[int | None] = [size for size in k if size < x.shape[1]]
            # not on all random directions, which hold the same information as all neurons
            if kind != RANDOM:
                sizes.append(None)  # all units
            by_size, best = _fit_folds(x, text, sizes)
            scores += [ProbeScore(kind, size, fold_scores) for size, fold_scores in by_size.items()]
            if kind != RANDOM:
                best_units[kind] = best
            advance(1)
    return Probes(
        label=text.label,
        classes=text.classes,
        pieces=torch.bincount(text.class_indices, minlength=len(text.classes)).tolist(),
        context=text.tokens.shape[1],
        notes=text.notes,
        scores=scores,
        best_units=best_units,
    )


def _fit_folds(
    x: ndarray, text: LabelledText, sizes: list[int | None]
) -> tuple[dict[int | None, list[FoldScore]], list[BestUnit]]:
    """Fit probes on units of x [pieces, units], and test them on each fold in turn -> {number of
    units (None: all): score on each fold}, and the best single unit of each class."""
    class_indices, folds = text.class_indices.numpy(), text.fold.numpy()
    by_size, best_of_fold = {size: [] for size in sizes}, []
    for tested in np.unique(folds).tolist():
        split = FoldSplit(x, class_indices, folds, tested)
        best_of_fold.append(split.score_best_units())
        for size in sizes:
            by_size[size].append(split.fit_all() if size is None else split.fit_sparse(size))
    units, aurocs = map(np.stack, zip(*best_of_fold, strict=True))  # [folds, classes]
    most_common = [Counter(chosen).most_common(1)[0] for chosen in units.T.tolist()]
    means = np.nanmean(aurocs, 0).tolist()  # NaN on a fold without pieces of the class
    best = [BestUnit(unit, n, mean) for (unit, n), mean in zip(most_common, means, strict=True)]
    return by_size, best
