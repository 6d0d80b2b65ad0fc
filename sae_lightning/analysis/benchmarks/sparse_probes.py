"""k-sparse probes of two classes (Gurnee et al. 2023, 2305.01610), by the protocol of Kantamneni et
al. 2025 (2502.16681, table 5).

    training part -> the k units whose class means differ most -> logistic regression
    test part     -> AUROC

Shapes: texts = texts of a set, units = columns of a representation. Features are sparse arrays, as
few are active on a text.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from scipy.sparse import csr_array, vstack
from torch import Tensor

from sae_lightning.analysis.probing.linear import allow_early_stopping, measure_aurocs
from sae_lightning.sae import SAE

CANDIDATES = np.logspace(-5, 5, 10)  # inverse strengths of regularisation to choose from
MAX_TRAINED = 1024  # texts
TRAINED_SHARE = 2 / 3
VALIDATION_SHARE, MAX_VALIDATION = 0.2, 100  # of the training part, to choose the regularisation
ROWS_AT_ONCE, UNITS_AT_ONCE = 256, 4096  # bound memory


class TextSplit(NamedTuple):
    """The texts of a set, split into a training and a test part."""

    train: ndarray
    """[training texts] indices; the classes take turns."""
    test: ndarray
    """[test texts] indices."""


def split_texts(texts: int, seed: int) -> TextSplit:
    """Split a `LabelledSet`, whose classes take turns, at random, with equally many texts of both
    classes in each part."""
    pairs = np.random.default_rng(seed).permutation(texts // 2)
    order = (2 * pairs[:, None] + [0, 1]).ravel()
    trained = 2 * (min(int(TRAINED_SHARE * texts), MAX_TRAINED) // 2)
    return TextSplit(order[:trained], order[trained:])


def measure_differences(x: ndarray | csr_array, labels: ndarray) -> ndarray:
    """Distance of the class means of each unit of x [texts, units], as a share of its mean strength
    where it is active -> [units]. (sae-probes' default; otherwise units with large values win.)"""
    strength = abs(x).sum(0) / ((x != 0).sum(0) + 1e-6)
    gap = x[labels == 1].mean(0) - x[labels == 0].mean(0)
    return np.abs(gap / (strength + 1e-6))


def choose_units(x: ndarray | csr_array, labels: ndarray, k: int) -> ndarray:
    """The k units of x [texts, units] whose class means differ most, the best first -> [k]."""
    return np.argsort(-measure_differences(x, labels), kind="stable")[:k]


def score_probe(x: ndarray, labels: ndarray, split: TextSplit) -> float:
    """Fit a logistic regression on the training part of x [texts, units] -> AUROC on the test part.

    The last texts of the training part choose the regularisation, and then are fitted on, too."""
    from sklearn.linear_model import LogisticRegression

    train_x, train_labels = x[split.train], labels[split.train]
    fitted = len(train_x) - min(int(VALIDATION_SHARE * len(train_x)), MAX_VALIDATION)

    def measure(model: LogisticRegression, x: ndarray, labels: ndarray) -> float:
        return float(measure_aurocs(model.decision_function(x)[:, None], labels, 2)[1, 0])

    candidate, scores = LogisticRegression(max_iter=1000, warm_start=True), []
    with allow_early_stopping():
        for c in CANDIDATES:  # each fit starts from the last one, which halves the time
            candidate.set_params(C=c).fit(train_x[:fitted], train_labels[:fitted])
            scores.append(measure(candidate, train_x[fitted:], train_labels[fitted:]))
        _, best = max(zip(scores, CANDIDATES, strict=True))  # of equals, the weakest penalty
        probe = LogisticRegression(C=best, max_iter=1000).fit(train_x, train_labels)
    return measure(probe, x[split.test], labels[split.test])


def score_sparse(
    x: ndarray | csr_array, labels: ndarray, split: TextSplit, sizes: tuple[int, ...]
) -> list[float]:
    """AUROC of the probe on the k best units of x [texts, units], for each k of `sizes`."""
    units = choose_units(x[split.train], labels[split.train], max(sizes))
    chosen = x[:, units]
    chosen = chosen.toarray() if isinstance(chosen, csr_array) else chosen
    return [score_probe(chosen[:, :k], labels, split) for k in sizes]


def score_all(x: ndarray | csr_array, labels: ndarray, split: TextSplit) -> float:
    """AUROC of the probe on all units of x [texts, units]."""
    return score_probe(rotate_into_rows(x, split.train), labels, split)


def rotate_into_rows(x: ndarray | csr_array, train: ndarray) -> ndarray:
    """Coordinates [texts, at most len(train)] of x [texts, units] in the space of its rows `train`.

    With an L2 penalty the best weights lie in that space: the probe is the same and far cheaper."""
    if x.shape[1] <= len(train) and not isinstance(x, csr_array):
        return x
    products = x @ x[train].T
    products = products.toarray() if isinstance(products, csr_array) else products
    squares, basis = np.linalg.eigh(products[train].astype(np.float64))
    lengths = np.sqrt(np.maximum(squares, squares.max() * 1e-10) + 1e-30)  # rounding; no activity
    return products @ (basis / lengths)


@torch.no_grad()
def encode_sparse(sae: SAE, x: Tensor) -> csr_array:
    """Features [texts, features] of activations x [texts, d], some texts at a time."""
    device = sae.W_enc.device
    parts = [csr_array(sae.encode(rows.to(device)).cpu().numpy()) for rows in x.split(ROWS_AT_ONCE)]
    return vstack(parts, format="csr")


def pick_random_directions(
    x: ndarray, directions: int, labels: ndarray, train: ndarray, most: int
) -> ndarray:
    """Draw `directions` random directions, always the same ones, and project x [texts, d] on the
    `most` of them whose class means differ most over the rows `train` -> [texts, most], the best
    first."""
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    random = np.random.default_rng(0)
    best, scores = np.empty((len(x), 0)), np.empty(0)
    for first in range(0, directions, UNITS_AT_ONCE):
        count = min(UNITS_AT_ONCE, directions - first)
        projections = x @ random.standard_normal((x.shape[1], count), dtype=np.float32)
        scores = np.append(scores, measure_differences(projections[train], labels[train]))
        best = np.concatenate([best, projections], axis=1)
        order = np.argsort(-scores, kind="stable")[:most]
        best, scores = best[:, order], scores[order]
    return best
