"""`suite=absorption`: is a letter's feature silent where a feature of a word fires?

words, or synthetic concepts with children -> ConceptSamples
ConceptSamples -> SAE, and each control    -> own features, shares of silent and absorbed samples
"""

import math
from statistics import fmean

import torch

from sae_lightning.analysis.benchmarks.absorption import (
    ConceptResult,
    ConceptSamples,
    SampleParts,
    list_known,
    measure_absorption,
)
from sae_lightning.analysis.benchmarks.absorption_sections import SHARES, make_absorption_sections
from sae_lightning.analysis.benchmarks.absorption_words import read_first_letters
from sae_lightning.analysis.benchmarks.benchmark import Benchmark
from sae_lightning.analysis.open_controls import open_controls
from sae_lightning.analysis.subject import Subject
from sae_lightning.errors import UserError
from sae_lightning.stream.synthetic import HeldOutConcepts
from sae_lightning.terminal import phase

SAMPLES = 16_384  # of synthetic concepts
MAX_PARENTS, MIN_SAMPLES = 32, 20


def run_absorption(subject: Subject) -> Benchmark:
    """Count absorption and splitting in `subject` and its controls: of first letters, or of parents
    among synthetic concepts. The score is the F1 of a concept's own features, since absorption is
    least in an SAE that has no such features."""
    controls = open_controls(subject, None, most=None)
    known = not subject.config.data_source.fits_text  # the concepts of data=synthetic
    samples = sample_parents(subject) if known else read_first_letters(subject)
    saes, results = {"this SAE": subject.sae} | controls, {}
    with phase("counting absorption", total=len(saes)) as advance:
        for name, sae in saes.items():
            results[name] = measure_absorption(samples, sae)
            advance(1)
    means = {name: average_results(of_sae) for name, of_sae in results.items()}
    numbers = {"means": means, "concepts": results}
    sections = make_absorption_sections(samples, results, means)
    return Benchmark(numbers, sections, means["this SAE"]["f1"])


def average_results(results: list[ConceptResult]) -> dict[str, float]:
    """Means over concepts of the shares, as far as they are known (NaN if none is), and of the
    number of own features."""
    known = {name: list_known(results, name) for name in SHARES.values()}
    features = {"features": fmean(len(result.features) for result in results)}
    return features | {name: fmean(values or [math.nan]) for name, values in known.items()}


def sample_parents(subject: Subject) -> ConceptSamples:
    """Sample synthetic concepts; those with children, whose directions are known, are the parents.
    UserError if there are no children, or none fires often enough."""
    data, sites = subject.config.data, [subject.sites.source]
    held_out = subject.config.data_source.open_held_out(sites, SAMPLES, 0)
    assert isinstance(held_out, HeldOutConcepts)
    world, active = held_out.world, held_out.strengths > 0
    fifth = torch.arange(SAMPLES) % 5
    parts = SampleParts(fifth < 3, fifth == 3, fifth == 4)
    # a concept without a parent is its own
    child = (world.parent != torch.arange(len(world.parent))).nonzero().squeeze(1)
    children = torch.zeros_like(active, dtype=torch.int32)  # number of active children
    children.index_add_(1, world.parent[child], active[:, child].int())
    counts = torch.stack([(children[part] > 0).sum(dim=0) for part in parts]).amin(dim=0)
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
        children=children[:, parents] > 0,
    )
