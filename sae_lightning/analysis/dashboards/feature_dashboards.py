"""Dashboards of features in SAEDashboard's keys, from which Neuronpedia's rows are made too.

    top          the strongest examples                       bin_min = bin_contains = -1
    interval     |-- 4 --|-- 3 --|-- 2 --|-- 1 --|-- 0 --|    random examples of each
                 0                                maximum     bin_min, bin_max, share of tokens

The first position of a sequence, BOS, is left out, as in SAEDashboard. Strengths are the SAE's own,
on raw activations: they are not multiplied by the norms of decoder rows.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sae_lightning.analysis.dashboards.contents import Dashboards
from sae_lightning.report.catalogue import (
    BEFORE,
    INTERVALS,
    LINEAR_BINS,
    WINDOW,
    Examples,
    find_interval,
    slice_units,
)
from sae_lightning.terminal import phase

FEATURES_PER_FILE = 128  # as in SAEDashboard
MAX_FILES = 1000  # Neuronpedia's importer lists no more
NEURONS_SHOWN = 3  # dimensions of the decoder row with the largest values
NUMBER_DIGITS = 5  # of numbers in the files

Dashboard = dict[str, Any]
"""A feature's dashboard, by SAEDashboard's keys."""


def list_dashboards(content: Dashboards) -> Iterator[list[Dashboard]]:
    """Yield the dashboards of the features of each file; shows a progress bar."""
    units = content.units
    with phase("writing dashboards", total=len(units)) as advance:
        for part in torch.tensor(units).split(max(FEATURES_PER_FILE, -(-len(units) // MAX_FILES))):
            yield _make_dashboards(content, part)
            advance(len(part))


def shorten_numbers(values: Tensor) -> list:
    """Nested lists of the values, to NUMBER_DIGITS significant digits."""
    if values.dim() > 1:
        return [shorten_numbers(row) for row in values]
    return [float(f"{value:.{NUMBER_DIGITS}g}") for value in values.tolist()]


@torch.no_grad()
def _make_dashboards(content: Dashboards, units: Tensor) -> list[Dashboard]:
    """Make the dashboards of `units` [n]."""
    W_dec, catalogue = content.subject.sae.W_dec, content.catalogue
    W_dec = W_dec[units.to(W_dec.device)].cpu()
    prompts, context = content.prompt_shape
    columns = {
        "feature_index": units.tolist(),
        "vector": shorten_numbers(W_dec) if content.settings.vectors else [[]] * len(units),
        **_describe_decoder(W_dec),
        **_describe_logits(content, units),
        "frac_nonzero": shorten_numbers(catalogue.statistics.densities[units].double()),
        **_describe_strengths(content, units),
    }
    constants = {
        f"correlated_{kind}_{what}": []
        for kind in ("neurons", "features")
        for what in ("indices", "l1", "pearson")
    }
    constants |= {"n_prompts_total": prompts, "n_tokens_in_prompt": context}
    constants |= {"dataset": content.dataset, "decoder_weights_dist": []}
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) | constants for row in rows]


def _describe_decoder(W_dec: Tensor) -> dict[str, list]:
    """The dimensions with the largest values in each row of W_dec [n, d], and their share of the
    row's L1 norm."""
    largest = W_dec.topk(min(NEURONS_SHOWN, W_dec.shape[1]), dim=1)
    norm = W_dec.abs().sum(dim=1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)
    return {
        "neuron_alignment_indices": largest.indices.tolist(),
        "neuron_alignment_values": shorten_numbers(largest.values),
        "neuron_alignment_l1": shorten_numbers(largest.values.abs() / norm),
    }


def _describe_logits(content: Dashboards, units: Tensor) -> dict[str, list]:
    """Tokens whose logits each of `units` [n] raises and lowers most, and a histogram of its effect
    on all; empty lists if there is no direct path to the logits."""
    keys = ("pos_str", "pos_values", "neg_str", "neg_values")
    keys += ("logits_hist_data_bar_values", "logits_hist_data_bar_heights")
    if content.effect is None:
        return {key: [[]] * len(units) for key in keys}
    effect, vocabulary = slice_units(content.effect, units), content.catalogue.vocabulary
    low, high = effect.lowered[:, :1], effect.raised[:, :1]
    columns = [
        [[vocabulary[token] for token in row] for row in effect.promoted.tolist()],
        shorten_numbers(effect.raised),
        [[vocabulary[token] for token in row] for row in effect.suppressed.tolist()],
        shorten_numbers(effect.lowered),
        shorten_numbers(low + (high - low) * (torch.arange(LINEAR_BINS) + 0.5) / LINEAR_BINS),
        effect.histogram.tolist(),
    ]
    return dict(zip(keys, columns, strict=True))


def _describe_strengths(content: Dashboards, units: Tensor) -> dict[str, list]:
    """A histogram of the strengths of each of `units` [n], and its examples."""
    catalogue = content.catalogue
    statistics, counts = catalogue.statistics, catalogue.linear_histogram[units]
    maximum, fired = statistics.maximum[units], statistics.firing_counts[units]
    centres = maximum[:, None] * (torch.arange(LINEAR_BINS) + 0.5) / LINEAR_BINS
    shares = counts.view(len(units), INTERVALS, -1).sum(dim=2).flip(1).double() / statistics.tokens
    shares[:, -1] += 1 - fired.double() / statistics.tokens  # where it is silent
    edges = maximum[:, None] * torch.arange(INTERVALS, -1, -1) / INTERVALS  # descending
    edges, shares = shorten_numbers(edges), shorten_numbers(shares)
    top, random = slice_units(catalogue.top, units), slice_units(catalogue.random, units)
    intervals = find_interval(random.peak_strength, maximum[:, None]).tolist()
    activations, vocabulary = [], catalogue.vocabulary
    for i, examples in enumerate(_list_examples(top, top.peak_strength, vocabulary)):
        highest = {"bin_min": -1.0, "bin_max": edges[i][0], "bin_contains": -1.0}
        activations.append([highest | example for example in examples if example])
    for i, examples in enumerate(_list_examples(random, maximum[:, None], vocabulary)):
        for interval, example in zip(intervals[i], examples, strict=True):
            if example:
                bounds = {"bin_min": edges[i][interval + 1], "bin_max": edges[i][interval]}
                activations[i].append(bounds | {"bin_contains": shares[i][interval]} | example)
    histograms = zip(shorten_numbers(centres), counts.tolist(), fired.tolist(), strict=True)
    values, heights = zip(*((c, n) if f else ([], []) for c, n, f in histograms), strict=True)
    return {
        "freq_hist_data_bar_values": [*values],
        "freq_hist_data_bar_heights": [*heights],
        "activations": activations,
    }


def _list_examples(
    examples: Examples, greatest: Tensor, vocabulary: list[str]
) -> list[list[Dashboard]]:
    """Tokens and strengths of each example [n, k]; empty where there is none. greatest: [n, k or 1]
    the strength that no token of the example exceeds, except by rounding to half precision."""
    place = examples.position[..., None] + torch.arange(WINDOW) - BEFORE
    inside = (examples.tokens >= 0) & (place > 0)  # without BOS
    # stored in half precision, except for the peak
    strengths = examples.strengths.float().minimum(greatest[..., None])
    strengths[..., BEFORE] = examples.peak_strength
    before = inside[..., :BEFORE].sum(dim=-1).tolist()
    lists = []
    for i, row in enumerate((examples.peak_strength > 0).tolist()):
        lists.append([])
        for j, exists in enumerate(row):
            lists[i].append({})
            if exists:
                keep = inside[i, j]
                lists[i][j] = {
                    "tokens": [vocabulary[t] for t in examples.tokens[i, j][keep].tolist()],
                    "values": shorten_numbers(strengths[i, j][keep]),
                    "qualifying_token_index": before[i][j],
                }
    return lists
