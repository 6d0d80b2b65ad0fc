"""Dashboards of features in SAEDashboard's keys, from which Neuronpedia's rows are made too.

    top          the strongest examples                       bin_min = bin_contains = -1
    interval     |-- 4 --|-- 3 --|-- 2 --|-- 1 --|-- 0 --|    random examples from each:
                 0                                maximum     bin_min, bin_max = its bounds,
                                                              bin_contains = share of tokens

The first position of a sequence, BOS, is left out, as in SAEDashboard.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sae_lightning.analysis.dashboards.contents import DashboardContent
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
NUMBER_DIGITS = 5  # significant digits of numbers in the files

Dashboard = dict[str, Any]
"""A feature's dashboard, by SAEDashboard's keys."""
Example = dict[str, Any]
"""An example in a dashboard, by SAEDashboard's keys; empty where a feature has fewer."""


def list_dashboards(content: DashboardContent) -> Iterator[list[Dashboard]]:
    """Yield the dashboards of the features in each file; shows a progress bar."""
    total = len(content.features)
    per_file = max(FEATURES_PER_FILE, -(-total // MAX_FILES))
    with phase("writing dashboards", total=total) as advance:
        for part in torch.tensor(content.features).split(per_file):
            yield _make_dashboards(content, part)
            advance(len(part))


def shorten_numbers(values: Tensor) -> list:
    """Convert to nested lists, and round values to NUMBER_DIGITS significant digits."""
    if values.dim() > 1:
        return [shorten_numbers(row) for row in values]
    return [float(f"{value:.{NUMBER_DIGITS}g}") for value in values.tolist()]


@torch.no_grad()
def _make_dashboards(content: DashboardContent, features: Tensor) -> list[Dashboard]:
    """Make the dashboards of `features` [n]."""
    W_dec, catalogue = content.subject.sae.W_dec, content.catalogue
    W_dec = W_dec[features.to(W_dec.device)].cpu()
    prompts, context = content.prompt_shape
    columns = {
        "feature_index": features.tolist(),
        "vector": shorten_numbers(W_dec) if content.settings.vectors else [[]] * len(features),
        **_describe_decoder(W_dec),
        **_describe_logits(content, features),
        "frac_nonzero": shorten_numbers(catalogue.statistics.densities[features].double()),
        **_describe_strengths(content, features),
    }
    # the same for all features; a list is empty if this package does not measure its numbers
    constants = {
        f"correlated_{units}_{column}": []
        for units in ("neurons", "features")
        for column in ("indices", "l1", "pearson")
    }
    constants |= {"n_prompts_total": prompts, "n_tokens_in_prompt": context}
    constants |= {"dataset": content.dataset, "decoder_weights_dist": []}
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) | constants for row in rows]


def _describe_decoder(W_dec: Tensor) -> dict[str, list]:
    """Find the dimensions with the largest values in each row of W_dec [n, d], and their shares of
    the row's L1 norm."""
    largest = W_dec.topk(min(NEURONS_SHOWN, W_dec.shape[1]), dim=1)
    l1 = W_dec.abs().sum(dim=1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)
    return {
        "neuron_alignment_indices": largest.indices.tolist(),
        "neuron_alignment_values": shorten_numbers(largest.values),
        "neuron_alignment_l1": shorten_numbers(largest.values.abs() / l1),
    }


def _describe_logits(content: DashboardContent, features: Tensor) -> dict[str, list]:
    """List the tokens whose logits each of `features` [n] raises and lowers most, with a histogram
    of its effect on all tokens; empty lists if there is no direct path to the logits."""
    keys = ("pos_str", "pos_values", "neg_str", "neg_values")
    keys += ("logits_hist_data_bar_values", "logits_hist_data_bar_heights")
    if content.effect is None:
        return {key: [[]] * len(features) for key in keys}
    effect, vocabulary = slice_units(content.effect, features), content.catalogue.vocabulary
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


def _describe_strengths(content: DashboardContent, features: Tensor) -> dict[str, list]:
    """Make a histogram of the strengths of each of `features` [n], and list its examples."""
    catalogue = content.catalogue
    statistics, counts = catalogue.statistics, catalogue.linear_histogram[features]
    maximum, firing_counts = statistics.maximum[features], statistics.firing_counts[features]
    centres = maximum[:, None] * (torch.arange(LINEAR_BINS) + 0.5) / LINEAR_BINS
    # bins ascend, but interval 0 is the top one
    tokens_by_interval = counts.view(len(features), INTERVALS, -1).sum(dim=2).flip(1)
    shares = tokens_by_interval.double() / statistics.tokens
    # the lowest interval includes the tokens on which a feature is silent
    shares[:, -1] += 1 - firing_counts.double() / statistics.tokens
    edges = maximum[:, None] * torch.arange(INTERVALS, -1, -1) / INTERVALS  # descending
    edges, shares = shorten_numbers(edges), shorten_numbers(shares)
    top, random = slice_units(catalogue.top, features), slice_units(catalogue.random, features)
    intervals = find_interval(random.peak_strength, maximum[:, None]).tolist()
    activations, vocabulary = [], catalogue.vocabulary
    for i, examples in enumerate(_list_examples(top, top.peak_strength, vocabulary)):
        bin_of_top = {"bin_min": -1.0, "bin_max": edges[i][0], "bin_contains": -1.0}
        activations.append([bin_of_top | example for example in examples if example])
    for i, examples in enumerate(_list_examples(random, maximum[:, None], vocabulary)):
        for interval, example in zip(intervals[i], examples, strict=True):
            if example:
                bounds = {"bin_min": edges[i][interval + 1], "bin_max": edges[i][interval]}
                activations[i].append(bounds | {"bin_contains": shares[i][interval]} | example)
    values, heights = shorten_numbers(centres), counts.tolist()
    for i in (firing_counts == 0).nonzero().flatten().tolist():  # never fires
        values[i], heights[i] = [], []
    return {
        "freq_hist_data_bar_values": values,
        "freq_hist_data_bar_heights": heights,
        "activations": activations,
    }


def _list_examples(
    examples: Examples, upper_bound: Tensor, vocabulary: list[str]
) -> list[list[Example]]:
    """List the tokens and strengths of each example, for n features and k examples each; {} where
    a feature has fewer. A strength above upper_bound [n, k or 1], because it is stored in half
    precision, is lowered to it."""
    # [n, k, WINDOW] position of each token in its sequence; the peak is token BEFORE of the window
    positions = examples.position[..., None] + torch.arange(WINDOW) - BEFORE
    inside = (examples.tokens >= 0) & (positions > 0)  # without BOS
    strengths = examples.strengths.float().minimum(upper_bound[..., None])
    strengths[..., BEFORE] = examples.peak_strength
    peak_index = inside[..., :BEFORE].sum(dim=-1).tolist()  # index among the tokens that are inside
    n, k = examples.peak_strength.shape
    lists: list[list[Example]] = [[{} for _ in range(k)] for _ in range(n)]
    for i, j in (examples.peak_strength > 0).nonzero().tolist():
        keep = inside[i, j]
        lists[i][j] = {
            "tokens": [vocabulary[t] for t in examples.tokens[i, j][keep].tolist()],
            "values": shorten_numbers(strengths[i, j][keep]),
            "qualifying_token_index": peak_index[i][j],
        }
    return lists
