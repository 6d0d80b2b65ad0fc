"""`suite=probing`: how well do k features tell two classes of texts apart?

    texts of all sets -> LLM -> last token ------> neurons, random directions
                                   ├-> SAE ------> features
                                   └-> controls -> their features

The protocol is that of Kantamneni et al. 2025 (2502.16681) as in their package sae-probes, except
that a set has each text only once. A probe on all neurons is called the dense probe.
"""

import numpy as np
from torch import Tensor

from sae_lightning.analysis.benchmarks.benchmark_result import BenchmarkResult
from sae_lightning.analysis.benchmarks.last_tokens import read_last_tokens
from sae_lightning.analysis.benchmarks.probing_benchmark_sections import make_probing_sections
from sae_lightning.analysis.benchmarks.probing_scores import SCORED_SIZE, SIZES, ProbingScores
from sae_lightning.analysis.benchmarks.probing_sets import LabelledSet, read_sets
from sae_lightning.analysis.benchmarks.sparse_probes import (
    encode_sparse,
    project_on_random_directions,
    score_all,
    score_sparse,
    split_texts,
)
from sae_lightning.analysis.open_controls import open_controls
from sae_lightning.analysis.probing.probes import FEATURES, NEURONS, RANDOM
from sae_lightning.analysis.subject import Subject
from sae_lightning.sae import SAE
from sae_lightning.terminal import phase

MAX_CONTEXT = 1024  # most tokens of a text that are read, BOS included


def run_probing(
    subject: Subject, sets: str | list[str], sets_folder: str | None, texts: int, splits: int
) -> BenchmarkResult:
    """Score the features of `subject`, neurons, random directions and the features of controls on
    labelled sets; the other arguments are settings of `BenchmarkTask`."""
    with phase("reading the sets"):
        labelled_sets = read_sets(sets, sets_folder, texts, subject.config.seed)
    context = min(MAX_CONTEXT, subject.context or MAX_CONTEXT)  # the LLM may have a limit
    x = read_last_tokens(subject, [text for s in labelled_sets for text in s.texts], context)
    saes = {FEATURES: subject.sae} | load_controls(subject)
    scores = score_sets(x, labelled_sets, saes, splits)
    return BenchmarkResult(
        scores.to_dict(),
        make_probing_sections(scores),
        scores.average_sets(FEATURES, SCORED_SIZE)[0],
    )


def load_controls(subject: Subject) -> dict[str, SAE]:
    """`control: <name>` -> SAE, for each control that a sweep trained beside `subject`."""
    controls = open_controls(subject, None, limit=None)  # all that the sweep has
    return {f"control: {name.replace('_', ' ')}": sae for name, sae in controls.items()}


def score_sets(
    x: Tensor, sets: list[LabelledSet], saes: dict[str, SAE], splits: int
) -> ProbingScores:
    """Fit and test all probes. x: activations [texts of all sets, d_in], set after set; saes: kind
    of units -> the SAE whose features they are; splits: random splits of each set."""
    kinds = [FEATURES, NEURONS, RANDOM, *(kind for kind in saes if kind != FEATURES)]
    # on all random directions no probe is fitted: they hold the same information as all neurons
    sizes = {kind: (*SIZES, None) for kind in kinds} | {RANDOM: SIZES}  # None: all units
    aurocs = {kind: {k: np.zeros((len(sets), splits)) for k in sizes[kind]} for kind in kinds}
    parts = x.split([len(s.texts) for s in sets])
    with phase("fitting probes", total=len(sets) * splits) as advance:
        for i, (x_of_set, labelled_set) in enumerate(zip(parts, sets, strict=True)):
            neurons, labels = x_of_set.numpy(), labelled_set.labels
            encoded = {kind: encode_sparse(sae, x_of_set) for kind, sae in saes.items()}
            for seed in range(splits):
                split = split_texts(len(labels), seed)
                projections = project_on_random_directions(
                    neurons, encoded[FEATURES].shape[1], labels, split.train, max(SIZES)
                )
                units = encoded | {NEURONS: neurons, RANDOM: projections}
                for kind, matrix in units.items():
                    sparse = score_sparse(matrix, labels, split, SIZES)
                    for k, auroc in zip(SIZES, sparse, strict=True):
                        aurocs[kind][k][i, seed] = auroc
                    if None in sizes[kind]:
                        aurocs[kind][None][i, seed] = score_all(matrix, labels, split)
                advance(1)
    return ProbingScores(sets, aurocs)
