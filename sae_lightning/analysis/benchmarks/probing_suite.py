"""`suite=probing`: how well do k features tell classes of texts apart?

    sets of texts -> LLM, once -> last token --------------> neurons, random directions
                                      ├-> SAE -------------> features
                                      └-> each control ----> its features

The protocol is that of Kantamneni et al. 2025 (2502.16681) as in their package sae-probes, except
that no text is used twice. A probe on all neurons is the dense probe of the activation.
"""

import numpy as np
from torch import Tensor

from sae_lightning.analysis.benchmarks.benchmark import Benchmark
from sae_lightning.analysis.benchmarks.last_tokens import read_last_tokens
from sae_lightning.analysis.benchmarks.probing_scores import SCORED_SIZE, SIZES, ProbingScores
from sae_lightning.analysis.benchmarks.probing_sets import LabelledSet, read_sets
from sae_lightning.analysis.benchmarks.probing_suite_sections import make_probing_sections
from sae_lightning.analysis.benchmarks.sparse_probes import (
    encode_sparse,
    pick_random_directions,
    score_all,
    score_sparse,
    split_texts,
)
from sae_lightning.analysis.open_controls import open_controls
from sae_lightning.analysis.probing.probes import FEATURES, NEURONS, RANDOM
from sae_lightning.analysis.subject import Subject
from sae_lightning.sae import SAE
from sae_lightning.terminal import phase

MAX_CONTEXT = 1024  # tokens of a text that are read


def run_probing(
    subject: Subject, sets: str | list[str], sets_folder: str | None, texts: int, splits: int
) -> Benchmark:
    """Score the features of `subject`, neurons, random directions and controls on labelled sets."""
    with phase("reading the sets"):
        labelled_sets = read_sets(sets, sets_folder, texts, subject.config.seed)
    context = min(MAX_CONTEXT, subject.context or MAX_CONTEXT)
    x = read_last_tokens(subject, [text for s in labelled_sets for text in s.texts], context)
    encoders = {FEATURES: subject.sae} | load_controls(subject)
    scores = score_sets(x, labelled_sets, encoders, splits)
    return Benchmark(
        scores.to_dict(),
        make_probing_sections(scores),
        scores.average_sets(FEATURES, SCORED_SIZE)[0],
    )


def load_controls(subject: Subject) -> dict[str, SAE]:
    """`control: <name>` -> SAE, for each control that a sweep trained beside `subject`."""
    controls = open_controls(subject, None, most=None)
    return {f"control: {name.replace('_', ' ')}": sae for name, sae in controls.items()}


def score_sets(
    x: Tensor, sets: list[LabelledSet], encoders: dict[str, SAE], splits: int
) -> ProbingScores:
    """Fit and test all probes; x [texts of all sets, d_in], `encoders` are the SAEs by kind."""
    kinds = [FEATURES, NEURONS, RANDOM, *(kind for kind in encoders if kind != FEATURES)]
    # kind -> k (None: all) -> [sets, splits], filled set by set
    scores: dict[str, dict[int | None, list[list[float]]]] = {kind: {} for kind in kinds}
    with phase("fitting probes", total=len(sets) * splits) as advance:
        for rows, of_set in zip(x.split([len(s.texts) for s in sets]), sets, strict=True):
            units = {kind: encode_sparse(sae, rows) for kind, sae in encoders.items()}
            neurons = rows.numpy()
            for kind in kinds:
                for k in (*SIZES, None) if kind != RANDOM else SIZES:
                    scores[kind].setdefault(k, []).append([])
            for seed in range(splits):
                split = split_texts(len(of_set.texts), seed)
                directions = pick_random_directions(
                    neurons, units[FEATURES].shape[1], of_set.labels, split.train, max(SIZES)
                )
                for kind, matrix in (units | {NEURONS: neurons, RANDOM: directions}).items():
                    aurocs = score_sparse(matrix, of_set.labels, split, SIZES)
                    for k, auroc in zip(SIZES, aurocs, strict=True):
                        scores[kind][k][-1].append(auroc)
                    if kind != RANDOM:  # all directions together hold the same as all neurons
                        scores[kind][None][-1].append(score_all(matrix, of_set.labels, split))
                advance(1)
    return ProbingScores(
        sets,
        {
            kind: {k: np.array(values) for k, values in by_k.items()}
            for kind, by_k in scores.items()
        },
    )
