"""Do features match abstract ideas better than neurons do?

    labelled pieces -> LLM -> site ----------> mean over tokens -> neurons   [pieces, d]
                               └-> SAE ------> mean over tokens -> features  [pieces, features]

k-sparse probing (Gurnee et al. 2023, 2305.01610): how well do k units predict a class? All neurons
together are the whole activation. Random directions, as many as there are features, show how much
is gained just by choosing among so many.
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
from sae_lightning.analysis.probing.labelled import LabelledText
from sae_lightning.analysis.probing.linear import Fold, FoldScore
from sae_lightning.analysis.subject import Subject
from sae_lightning.sae import SAE
from sae_lightning.terminal import phase

FEATURES, NEURONS, RANDOM = "features", "neurons", "random directions"
CONTROL_K = (1, 5)  # units for each class, in a comparison with controls


class ProbeScore(NamedTuple):
    """Scores of probes on k units of one kind; each fold is scored by probes not fitted on it."""

    units: str
    """features, neurons or random directions"""
    k: int | None
    """Units for each class; None for all."""
    folds: list[FoldScore]

    @property
    def accuracy(self) -> float:
        """Mean accuracy over tested folds."""
        return fmean(fold.accuracy for fold in self.folds)

    @property
    def auroc(self) -> float:
        """Mean AUROC over tested folds."""
        return fmean(fold.auroc for fold in self.folds)

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the means over folds."""
        return self._asdict() | {"accuracy": self.accuracy, "auroc": self.auroc}


class BestUnit(NamedTuple):
    """The single unit that best separates a class from all others."""

    unit: int
    """The unit that was chosen most often."""
    folds: int
    """Number of folds for which it was chosen."""
    auroc: float
    """Mean AUROC over tested folds, each with the unit that was chosen for it."""


class Probes(NamedTuple):
    """How well features and neurons predict one label."""

    label: str
    classes: list[str]
    pieces: list[int]
    """Pieces of text of each class."""
    context: int
    """Tokens of a piece, BOS included."""
    notes: list[str]
    scores: list[ProbeScore]
    """One for each kind of units and each k."""
    matches: dict[str, list[BestUnit]]
    """features, neurons -> the best unit of each class."""
    controls: list[ProbeScore] = []
    """Of the features of controls: the kind of units is the control's name."""

    @property
    def majority(self) -> float:
        """Accuracy of always saying the most frequent class."""
        return max(self.pieces) / sum(self.pieces)

    def find_score(self, units: str, k: int | None) -> ProbeScore | None:
        """The score of probes on k units (None: all) of a kind; None if it was not measured."""
        scores = [*self.scores, *self.controls]
        return next((s for s in scores if (s.units, s.k) == (units, k)), None)

    def to_dict(self) -> dict[str, Any]:
        """The content of `probe.json`, by key."""
        return self._asdict() | {
            "pieces": dict(zip(self.classes, self.pieces, strict=True)),
            "majority": self.majority,
            "scores": [score.to_dict() for score in self.scores],
            "controls": [score.to_dict() for score in self.controls],
            "matches": {
                units: dict(zip(self.classes, best_units, strict=True))
                for units, best_units in self.matches.items()
            },
        }


class PieceMeans:
    """Mean activations over the tokens of each piece of text."""

    def __init__(self, pieces: int, features: int) -> None:
        self._pieces, self._features, self._filled = pieces, features, 0
        self._means: dict[str, Tensor] = {}

    def add(self, batch: EncodedBatch) -> None:
        keep = batch.keep[..., None]
        count = keep.sum(1).clamp(min=1)
        strengths, active = batch.active_features
        features = strengths.new_zeros(*batch.keep.shape, self._features)
        features[..., active] = strengths
        means = {FEATURES: features.sum(1) / count, NEURONS: (batch.x * keep).sum(1) / count}
        end = self._filled + len(count)
        for units, rows in means.items():
            # allocated once: small tensors that outlive the large ones of each batch would
            # fragment memory
            if units not in self._means:
                self._means[units] = torch.empty(self._pieces, rows.shape[1])
            self._means[units][self._filled : end] = rows
        self._filled = end

    def result(self) -> dict[str, Tensor]:
        """Features [pieces, features] and neurons [pieces, d], float32."""
        return self._means


def probe(
    subject: Subject,
    labelled: LabelledText,
    *,
    k: tuple[int, ...] = (1, 2, 5, 16),
    batch: int = 16,
    controls: Mapping[str, SAE] = {},
) -> Probes:
    """Read the labelled text, `batch` pieces at a time, and fit probes on k units and on all.
    `controls`: other SAEs of the same site; their probes are on CONTROL_K features."""
    total, text = len(labelled.tokens), labelled.split_batches(batch)
    saes = subject.sae, *controls.values()
    means, *control_means = (PieceMeans(total, sae.config.features) for sae in saes)
    others = [(sae, [of_sae]) for sae, of_sae in zip(controls.values(), control_means, strict=True)]
    label = "reading labelled text"
    collect(subject, text, [means], total=total, label=label, controls=others)
    result, scores = fit_probes(means.result(), labelled, k=k), []
    del means
    for name, of_control in zip(controls, control_means, strict=True):
        with phase(f"fitting probes on {name}"):
            fold_scores, _ = _fit_folds(
                of_control.result()[FEATURES].numpy(), labelled, [*CONTROL_K]
            )
        scores += [ProbeScore(name, *of_k) for of_k in fold_scores.items()]
    return result._replace(controls=scores)


def fit_probes(
    pooled: dict[str, Tensor], labelled: LabelledText, *, k: tuple[int, ...] = (1, 2, 5, 16)
) -> Probes:
    """Fit and test probes on features and on neurons, `pooled` [pieces, units] each."""
    from sklearn.preprocessing import StandardScaler

    representations = {units: x.numpy() for units, x in pooled.items()}
    neurons = StandardScaler().fit_transform(representations[NEURONS])
    noise = torch.Generator().manual_seed(0)
    directions = torch.randn(neurons.shape[1], pooled[FEATURES].shape[1], generator=noise)
    representations[RANDOM] = neurons @ directions.numpy()
    scores, matches = [], {}
    with phase("fitting probes", total=len(representations)) as advance:
        for units, x in representations.items():
            sizes: list[int | None] = [size for size in k if size < x.shape[1]]
            if units != RANDOM:  # all of them together hold the same as all neurons
                sizes.append(None)
            fold_scores, best_units = _fit_folds(x, labelled, sizes)
            scores += [ProbeScore(units, *of_k) for of_k in fold_scores.items()]
            if units != RANDOM:
                matches[units] = best_units
            advance(1)
    return Probes(
        label=labelled.label,
        classes=labelled.classes,
        pieces=torch.bincount(labelled.target, minlength=len(labelled.classes)).tolist(),
        context=labelled.tokens.shape[1],
        notes=labelled.notes,
        scores=scores,
        matches=matches,
    )


def _fit_folds(
    x: ndarray, labelled: LabelledText, sizes: list[int | None]
) -> tuple[dict[int | None, list[FoldScore]], list[BestUnit]]:
    """k (None: all) -> the score on each fold; and the best single unit of each class."""
    target, folds = labelled.target.numpy(), labelled.fold.numpy()
    fold_scores, singles = {size: [] for size in sizes}, []
    for tested in np.unique(folds).tolist():
        fold = Fold(x, target, folds, tested)
        singles.append(fold.score_best_units())
        for size in sizes:
            fold_scores[size].append(fold.fit_all() if size is None else fold.fit_sparse(size))
    units, aurocs = map(np.stack, zip(*singles, strict=True))  # [folds, classes]
    best = [Counter(chosen).most_common(1)[0] for chosen in units.T.tolist()]
    means = np.nanmean(aurocs, 0).tolist()
    return fold_scores, [BestUnit(*unit, mean) for unit, mean in zip(best, means, strict=True)]
