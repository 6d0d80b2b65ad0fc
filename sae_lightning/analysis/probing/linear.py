"""Linear probes on pooled representations, fitted on some folds and tested on another.

    one of k units a class    units with the largest |AUROC - 1/2| on the fitted folds, then a
                              logistic regression, class against the rest
    all units                 one logistic regression over all classes

Shapes: pieces = pieces of text, units = columns of a representation.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SPARSE_C = 0.1  # of k standardised units; 0.01 and 1 change the AUROC at k = 16 by < 0.02
# of all units, so scaled that their squares add up to about 1; chosen on the fitted folds
ALL_C = (1.0, 10.0, 100.0, 1000.0)


class Outcome(NamedTuple):
    """How probes did on a fold that they were not fitted on."""

    accuracy: float
    """Share of pieces whose class scores highest."""
    auroc: float
    """Of each class against the rest, averaged over classes."""


class Single(NamedTuple):
    """The unit that tells each class best on the fitted folds, [classes]."""

    unit: Tensor
    """int64"""
    auroc: Tensor
    """On the tested fold; below 1/2 where it points the other way there."""


class Fold:
    """A representation [pieces, units] with its classes, cut into fitted and tested pieces."""

    def __init__(self, x: Tensor, target: Tensor, fold: Tensor, tested: int):
        self.classes = int(target.max()) + 1
        test = fold == tested
        self.target, self.test_target = target[~test], target[test]
        self.x, self.test_x = standardised(x[~test], x[test])
        # one of the fitted folds chooses how strongly to regularise
        folds = sorted(set(fold.tolist()) - {tested})
        self.chooses = fold[~test] == folds[tested % len(folds)]
        self.detection = auroc_of_units(self.x, self.target, self.classes)

    def single(self) -> Single:
        """The best unit of each class."""
        unit = (self.detection - 0.5).abs().argmax(1)
        sign = (self.detection.gather(1, unit[:, None])[:, 0] - 0.5).sign()
        chosen = self.test_x[:, unit] * sign  # [pieces, classes]
        held_out = auroc_of_units(chosen, self.test_target, self.classes).diagonal()
        return Single(unit, held_out)

    def sparse(self, k: int) -> Outcome:
        """Probes on k units of each class."""
        units = (self.detection - 0.5).abs().topk(k, dim=1).indices
        scores = torch.zeros(len(self.test_x), self.classes)
        for number in range(self.classes):
            if self.classes == 2 and number == 0:
                continue  # the mirror image of the other
            chosen = units[number]
            probe = _regression(self.x[:, chosen], self.target == number, SPARSE_C)
            scores[:, number] = _decision(probe, self.test_x[:, chosen])
        if self.classes == 2:
            scores[:, 0] = -scores[:, 1]
        return outcome(scores, self.test_target)

    def all(self) -> Outcome:
        """A probe on all units."""
        x, test_x = self.x, self.test_x
        if x.shape[1] > len(x):
            # The weights that a squared penalty leaves are sums of the fitted rows: turned into
            # the rows' own space, the problem is the same one and far smaller.
            basis = torch.linalg.svd(x, full_matrices=False).Vh.T
            x, test_x = x @ basis, test_x @ basis
        scale = self.x.shape[1] ** -0.5
        x, test_x = x * scale, test_x * scale
        fit, check = ~self.chooses, self.chooses
        tried = {c: _regression(x[fit], self.target[fit], c) for c in ALL_C}
        best = max(
            ALL_C, key=lambda c: outcome(_scores(tried[c], x[check]), self.target[check]).auroc
        )
        return outcome(_scores(_regression(x, self.target, best), test_x), self.test_target)


def standardised(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both, so that columns of `x` have mean 0 and variance 1; a constant column becomes 0."""
    mean, std = x.mean(0), x.std(0, correction=0)
    scale = torch.where(std > 1e-6 * mean.abs(), 1 / std.clamp(min=1e-30), 0)
    return (x - mean) * scale, (other - mean) * scale


def auroc_of_units(x: Tensor, target: Tensor, classes: int) -> Tensor:
    """Probability that a piece of a class has more of a unit than one of another class has, ties
    counted half: [classes, units] from x [pieces, units]."""
    columns = x.T.contiguous()
    ordered = columns.sort(dim=1).values
    below = torch.searchsorted(ordered, columns)
    up_to = torch.searchsorted(ordered, columns, right=True)
    ranks = (below + up_to + 1).double() / 2  # [units, pieces]
    members = torch.nn.functional.one_hot(target, classes).double()  # [pieces, classes]
    inside = members.sum(0)  # [classes]
    pairs = inside * (len(target) - inside)
    wins = (ranks @ members).T - (inside * (inside + 1) / 2)[:, None]
    return wins / pairs[:, None]


def outcome(scores: Tensor, target: Tensor) -> Outcome:
    """Accuracy and AUROC of scores [pieces, classes]."""
    auroc = auroc_of_units(scores, target, scores.shape[1]).diagonal()
    accuracy = (scores.argmax(1) == target).float().mean().item()
    return Outcome(accuracy, auroc[auroc.isfinite()].mean().item())


def _regression(x: Tensor, target: Tensor, c: float):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # to stop early is one more way to regularise
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=300).fit(x.numpy(), target.numpy())


def _decision(probe, x: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(probe.decision_function(x.numpy()), np.float32))


def _scores(probe, x: Tensor) -> Tensor:
    """Scores [pieces, classes]."""
    decision = _decision(probe, x)
    return decision if decision.ndim == 2 else torch.stack([-decision, decision], 1)
