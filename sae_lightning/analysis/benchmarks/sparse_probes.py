"""k-sparse probes that tell two classes apart (Gurnee et al. 2023, 2305.01610), by the protocol of
Kantamneni et al. 2025 (2502.16681, table 5).

    training part -> the k units whose class means differ most -> logistic regression
    test part     -> AUROC

Shapes: texts = texts of a set, units = features, neurons or random directions, d = width of the
site. Features are held as sparse arrays, because few are active on a text.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from scipy.sparse import csr_array, vstack
from torch import Tensor

from sae_lightning.analysis.probing.linear import allow_early_stopping, measure_aurocs
from sae_lightning.sae import SAE

INVERSE_PENALTIES = np.logspace(-5, 5, 10)  # values of sklearn's C to choose from
TRAINING_SHARE, MAX_TRAINING = 2 / 3, 1024  # training texts: share of a set, and limit
VALIDATION_SHARE, MAX_VALIDATION = 0.2, 100  # validation texts: share of the training texts, limit
TEXTS_AT_ONCE, DIRECTIONS_AT_ONCE = 256, 4096  # bound memory


class TextSplit(NamedTuple):
    """The texts of a set, split into a training and a test part."""

    train: ndarray
    """[training texts] indices; the two classes take turns."""
    test: ndarray
    """[test texts] indices."""


def split_texts(texts: int, seed: int) -> TextSplit:
    """Split a `LabelledSet` of `texts` texts at random; each part has equally many texts of both
    classes."""
    pairs = np.random.default_rng(seed).permutation(texts // 2)  # pair i: texts 2 * i, 2 * i + 1
    order = (2 * pairs[:, None] + [0, 1]).ravel()
    training_texts = 2 * (min(int(TRAINING_SHARE * texts), MAX_TRAINING) // 2)  # whole pairs
    return TextSplit(order[:training_texts], order[training_texts:])


def measure_differences(x: ndarray | csr_array, labels: ndarray) -> ndarray:
    """Distance between the class means of each unit of x [texts, units], divided by the mean of the
    unit's |values| that are not 0 -> [units].

    The division is sae-probes' default; otherwise units with large values would always win. The
    1e-6 makes the result 0 for a unit that is 0 on all texts."""
    strength = abs(x).sum(0) / ((x != 0).sum(0) + 1e-6)
    gap = x[labels == 1].mean(0) - x[labels == 0].mean(0)
    return np.abs(gap / (strength + 1e-6))


def choose_units(x: ndarray | csr_array, labels: ndarray, k: int) -> ndarray:
    """The k units of x [texts, units] whose class means differ most, the best first -> [k]."""
    return np.argsort(-measure_differences(x, labels), kind="stable")[:k]


def score_probe(x: ndarray, labels: ndarray, split: TextSplit) -> float:
    """Fit a logistic regression on the training part of x [texts, units] -> AUROC on the test part.

    To choose the penalty, the last training texts are held back: probes are fitted without them and
    compared by AUROC on them. Then a probe is fitted on the whole training part."""
    from sklearn.linear_model import LogisticRegression

    train_x, train_labels = x[split.train], labels[split.train]
    validation_texts = min(int(VALIDATION_SHARE * len(train_x)), MAX_VALIDATION)
    start = len(train_x) - validation_texts  # index of the first validation text

    def measure_auroc(probe: LogisticRegression, x: ndarray, labels: ndarray) -> float:
        # the only unit is the probe's output; [1, 0]: of class 1, unit 0
        return float(measure_aurocs(probe.decision_function(x)[:, None], labels, 2)[1, 0])

    trial, aurocs = LogisticRegression(max_iter=1000, warm_start=True), []
    with allow_early_stopping():
        for c in INVERSE_PENALTIES:  # each fit starts from the one before, which halves the time
            trial.set_params(C=c).fit(train_x[:start], train_labels[:start])
            aurocs.append(measure_auroc(trial, train_x[start:], train_labels[start:]))
        _, best_c = max(zip(aurocs, INVERSE_PENALTIES, strict=True))  # if equal, the larger C
        probe = LogisticRegression(C=best_c, max_iter=1000).fit(train_x, train_labels)
    return measure_auroc(probe, x[split.test], labels[split.test])


def score_sparse(
    x: ndarray | csr_array, labels: ndarray, split: TextSplit, sizes: tuple[int, ...]
) -> list[float]:
    """AUROC of a probe on the k best units of x [texts, units], for each k of `sizes`."""
    units = choose_units(x[split.train], labels[split.train], max(sizes))
    chosen = x[:, units]
    chosen = chosen.toarray() if isinstance(chosen, csr_array) else chosen
    return [score_probe(chosen[:, :k], labels, split) for k in sizes]


def score_all(x: ndarray | csr_array, labels: ndarray, split: TextSplit) -> float:
    """AUROC of a probe on all units of x [texts, units]."""
    return score_probe(reduce_to_row_space(x, split.train), labels, split)


def reduce_to_row_space(x: ndarray | csr_array, train: ndarray) -> ndarray:
    """Coordinates [texts, at most len(train)] of x [texts, units] in the space spanned by its rows
    `train`; x itself if it is dense and has at most len(train) columns.

    With an L2 penalty the best weights lie in that space, so a probe on the coordinates is the same
    probe, at far less cost."""
    if x.shape[1] <= len(train) and not isinstance(x, csr_array):
        return x
    products = x @ x[train].T
    products = products.toarray() if isinstance(products, csr_array) else products
    # if x[train] = U @ S @ V.T, the coordinates x @ V are products @ U / S; S^2: eigenvalues
    squares, basis = np.linalg.eigh(products[train].astype(np.float64))
    # bounded against rounding errors and, where all of x is 0, against a division by 0
    lengths = np.sqrt(np.maximum(squares, squares.max() * 1e-10) + 1e-30)
    return products @ (basis / lengths)


@torch.no_grad()
def encode_sparse(sae: SAE, x: Tensor) -> csr_array:
    """Encode activations x [texts, d], some texts at a time -> features [texts, features]."""
    device = sae.W_enc.device
    parts = [
        csr_array(sae.encode(part.to(device)).cpu().numpy()) for part in x.split(TEXTS_AT_ONCE)
    ]
    return vstack(parts, format="csr")


def project_on_random_directions(
    x: ndarray, directions: int, labels: ndarray, train: ndarray, k: int
) -> ndarray:
    """Project x [texts, d], standardised, on `directions` random directions (fixed seed). Keep the
    k projections whose class means differ most on the texts `train`, the best first
    -> [texts, k]."""
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    rng = np.random.default_rng(0)
    best, differences = np.empty((len(x), 0)), np.empty(0)
    for first in range(0, directions, DIRECTIONS_AT_ONCE):
        count = min(DIRECTIONS_AT_ONCE, directions - first)
        projections = x @ rng.standard_normal((x.shape[1], count), dtype=np.float32)
        new = measure_differences(projections[train], labels[train])
        differences = np.append(differences, new)
        best = np.concatenate([best, projections], axis=1)
        order = np.argsort(-differences, kind="stable")[:k]
        best, differences = best[:, order], differences[order]
    return best
