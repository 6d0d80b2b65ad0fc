"""Linear probes on representations of pieces of text, fitted on some folds and tested on another.

    k units of a class   the units with the largest |AUROC - 1/2| on the fitted folds, then a
                         logistic regression of the class against the rest
    all units            one logistic regression over all classes

Shapes: pieces = pieces of text, units = columns of a representation.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy import ndarray

UNITS_AT_ONCE = 4096  # units whose values are ranked at a time: bounds memory
# sklearn's C, the inverse of the L2 penalty.
SPARSE_C = 0.1  # for k units; 0.01 and 1 change the AUROC at k = 16 by < 0.02
ALL_C = (1.0, 10.0, 100.0, 1000.0)  # for all units: one of these is chosen


class FoldScore(NamedTuple):
    """Scores of probes on a fold that they were not fitted on."""

    accuracy: float
    """Share of pieces whose true class scores highest."""
    auroc: float
    """AUROC of each class against the rest, averaged over classes."""


class FoldSplit:
    """A representation x [pieces, units], split for probes. Pieces of the fold `tested` are held
    out. The other pieces fit probes, and their mean and deviation standardise the units.
    class_indices, fold: [pieces] class and fold of each piece."""

    def __init__(self, x: ndarray, class_indices: ndarray, fold: ndarray, tested: int):
        from sklearn.preprocessing import StandardScaler

        self.classes = int(class_indices.max()) + 1
        test = fold == tested
        self.fit_class_indices, self.test_class_indices = class_indices[~test], class_indices[test]
        scaler = StandardScaler()
        self.fit_x, self.test_x = scaler.fit_transform(x[~test]), scaler.transform(x[test])
        fit_folds = sorted({*fold.tolist()} - {tested})
        # `fit_all` chooses its penalty on one of these; which one depends on the tested fold
        validation_fold = fit_folds[tested % len(fit_folds)]
        self.is_validation = fold[~test] == validation_fold
        self.aurocs = measure_aurocs(self.fit_x, self.fit_class_indices, self.classes)

    def score_best_units(self) -> tuple[ndarray, ndarray]:
        """The unit that predicts each class best on the fitted folds, and its AUROC on the tested
        fold (below 1/2 if its sign is reversed there), both [classes]."""
        units = np.abs(self.aurocs - 0.5).argmax(1)
        # a unit with an AUROC below 1/2 is negated
        signs = np.sign(self.aurocs[range(self.classes), units] - 0.5)
        best = self.test_x[:, units] * signs  # [pieces, classes]
        aurocs = measure_aurocs(best, self.test_class_indices, self.classes)  # [classes, classes]
        return units, aurocs.diagonal()  # of each class, by the unit that was chosen for it

    def fit_sparse(self, k: int) -> FoldScore:
        """Fit and test one probe for each class, on its k best units."""
        from sklearn.linear_model import LogisticRegression

        # one probe is enough for two classes
        classes = [1] if self.classes == 2 else range(self.classes)
        scores = []
        for c in classes:
            units = np.argsort(-np.abs(self.aurocs[c] - 0.5), kind="stable")[:k]
            with allow_early_stopping():
                probe = LogisticRegression(C=SPARSE_C, max_iter=300)
                probe.fit(self.fit_x[:, units], self.fit_class_indices == c)
            scores.append(probe.decision_function(self.test_x[:, units]))
        return score_predictions(np.stack(scores, 1), self.test_class_indices)

    def fit_all(self) -> FoldScore:
        """Fit and test one probe on all units."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV

        x, test_x = self.fit_x, self.test_x
        if x.shape[1] > len(x):
            # With an L2 penalty the best weights are a linear combination of the rows of x. So a
            # probe on coordinates in the space of the rows is the same, and far cheaper.
            _, _, basis = np.linalg.svd(x, full_matrices=False)
            x, test_x = x @ basis.T, test_x @ basis.T
        scale = self.fit_x.shape[1] ** -0.5  # so that C means the same for any number of units
        search = GridSearchCV(
            LogisticRegression(max_iter=300),
            {"C": ALL_C},
            cv=[(np.flatnonzero(~self.is_validation), np.flatnonzero(self.is_validation))],
            scoring=lambda probe, x, class_indices: (
                score_predictions(probe.decision_function(x), class_indices).auroc
            ),
        )
        with allow_early_stopping():
            search.fit(x * scale, self.fit_class_indices)
        return score_predictions(search.decision_function(test_x * scale), self.test_class_indices)


def measure_aurocs(x: ndarray, class_indices: ndarray, classes: int) -> ndarray:
    """AUROC of each unit for each class, [classes, units], from x [pieces, units]: probability that
    the unit is stronger on a piece of the class than on another, ties counted half; NaN for a class
    of no pieces or of all."""
    from scipy.stats import rankdata

    is_member = np.eye(classes)[class_indices].T  # [classes, pieces] 0 or 1
    members = is_member.sum(1, keepdims=True)
    # in parts, because rankdata takes many times the memory of its input
    parts = [x[:, first : first + UNITS_AT_ONCE] for first in range(0, x.shape[1], UNITS_AT_ONCE)]
    rank_sums = np.concatenate([is_member @ rankdata(part, axis=0) for part in parts], axis=1)
    wins = rank_sums - members * (members + 1) / 2  # Mann-Whitney U
    with np.errstate(invalid="ignore"):
        return wins / (members * (len(class_indices) - members))


def score_predictions(scores: ndarray, class_indices: ndarray) -> FoldScore:
    """Accuracy and AUROC of scores [pieces, classes] or, for two classes, of the scores of class 1
    alone, [pieces] or [pieces, 1]. The AUROC is the mean over classes that have pieces."""
    if scores.ndim == 1 or scores.shape[1] == 1:
        scores = scores.reshape(-1, 1) * [-1, 1]  # class 0, class 1
    auroc = measure_aurocs(scores, class_indices, scores.shape[1]).diagonal()
    return FoldScore(float((scores.argmax(1) == class_indices).mean()), float(np.nanmean(auroc)))


@contextmanager
def allow_early_stopping() -> Iterator[None]:
    """Silence the warning that a fit has not converged: stopping early only regularises more."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
