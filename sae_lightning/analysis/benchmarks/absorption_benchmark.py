"""`suite=absorption`: is a letter's feature silent where a feature of a word fires?

words, or synthetic concepts with children -> ConceptSamples
ConceptSamples -> SAE, and each control    -> ConceptResult of each concept
"""

import math
from statistics import fmean

import torch

from sae_lightning.analysis.benchmarks.absorption import (
    ConceptResult,
    ConceptSamples,
    SampleParts,
    list_values,
    measure_absorption,
)
from sae_lightning.analysis.benchmarks.absorption_sections import (
    SCORE_FIELDS,
    make_absorption_sections,
)
from sae_lightning.analysis.benchmarks.benchmark_result import BenchmarkResult
from sae_lightning.analysis.benchmarks.first_letters import read_first_letters
from sae_lightning.analysis.open_controls import open_controls
from sae_lightning.analysis.subject import Subject
from sae_lightning.errors import UserError
from sae_lightning.stream.synthetic import HeldOutConcepts
from sae_lightning.terminal import phase

SAMPLES = 16_384  # samples of synthetic activations
MAX_PARENTS = 32
MIN_SAMPLES = 20  # a parent is left out if fewer samples of one of the parts have an active child


def run_absorption(subject: Subject) -> BenchmarkResult:
    """Count absorption and splitting in `subject` and its controls: of first letters, or of parents
    among synthetic concepts. The score is the mean F1 of own features, not a rate of absorption: an
    SAE that has no features for the concepts cannot absorb them, and would seem best."""
    controls = open_controls(subject, None, limit=None)  # all that the sweep has
    is_text = subject.config.data_source.may_be_from_llm  # else data=synthetic
    samples = read_first_letters(subject) if is_text else sample_parents(subject)
    saes, results = {"this SAE": subject.sae} | controls, {}
    with phase("counting absorption", total=len(saes)) as advance:
        for name, sae in saes.items():
            results[name] = measure_absorption(samples, sae)
            advance(1)
    means = {name: average_results(concepts) for name, concepts in results.items()}
    numbers = {"means": means, "concepts": results}
    sections = make_absorption_sections(samples, results, means)
    return BenchmarkResult(numbers, sections, means["this SAE"]["f1"])


def average_results(results: list[ConceptResult]) -> dict[str, float]:
    """Mean over concepts of the number of own features and of each field in SCORE_FIELDS, without
    NaNs; NaN if all values are NaN."""
    means = {"features": fmean(len(result.features) for result in results)}
    for field in SCORE_FIELDS.values():
        means[field] = fmean(list_values(results, field) or [math.nan])
    return means


def sample_parents(subject: Subject) -> ConceptSamples:
    """Sample synthetic activations. The concepts are the parents whose children fire most often,
    and their directions the true ones. UserError if no children fire often enough."""
    data, sites = subject.config.data, [subject.sites.source]
    held_out = subject.config.data_source.open_held_out(sites, SAMPLES, loss_tokens=0)
    assert isinstance(held_out, HeldOutConcepts)
    world, active = held_out.world, held_out.strengths > 0  # world: the concepts, with parents
    fifth = torch.arange(SAMPLES) % 5  # 60 % fit, 20 % choose, 20 % test, as for first letters
    parts = SampleParts(fifth < 3, fifth == 3, fifth == 4)
    is_child = world.parent != torch.arange(len(world.parent))  # parent[i] = i: has no parent
    children = is_child.nonzero().squeeze(1)
    active_children = torch.zeros_like(active, dtype=torch.int32)  # number [samples, concepts]
    active_children.index_add_(1, world.parent[children], active[:, children].int())
    has_child = active_children > 0
    # [concepts] samples with an active child, in the part that has fewest
    counts = torch.stack([has_child[part].sum(dim=0) for part in parts]).amin(dim=0)
    parents = counts.argsort(descending=True, stable=True)[:MAX_PARENTS]
    parents = parents[counts[parents] >= MIN_SAMPLES].sort().values
    if not len(parents):
        raise UserError(
            f"data.hierarchy={data.hierarchy}: no concept has children that fire on enough of "
            f"{SAMPLES:,} samples; train on data=synthetic with a larger data.hierarchy, or fewer "
            "data.concepts"
        )
    x = held_out.activations(subject.sites.source).cpu()
    return ConceptSamples(
        noun="parent concept",
        concepts=[str(i) for i in parents.tolist()],
        names=[f"sample {i}" for i in range(SAMPLES)],
        source=x,
        target=x,
        labels=active[:, parents],
        detected=active[:, parents],
        directions=world.directions[parents],
        parts=parts,
        probe_f1=[math.nan] * len(parents),
        children=has_child[:, parents],
    )
