"""Writes the feature files that circuit-tracer's page shows: `circuit-tracer start-server ...
--features_dir FOLDER`, or the folder `features` beside a transcoder set on the hub.

index.json.gz   {"<layer>": {"filename": "layer_<layer>.bin", "offsets": [features + 1]}}
layer_9.bin     for each feature: length in 4 bytes, little-endian; zlib-compressed JSON
"""

import gzip
import json
import zlib
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from sae_lightning.analysis.dashboards.contents import (
    DashboardContent,
    DashboardSettings,
    open_content,
)
from sae_lightning.analysis.dashboards.feature_dashboards import Dashboard, list_dashboards
from sae_lightning.analysis.export_weights import find_blocks
from sae_lightning.runs.jobs import is_sweep


def open_blocks(
    task: DashboardSettings, given_settings: Collection[str]
) -> list[Callable[[], DashboardContent]]:
    """Return functions that open one SAE each: that of the run, or those of a sweep. UserError if
    two of them read the same block."""
    if not is_sweep(Path(task.run)):
        return [partial(open_content, task, given_settings)]
    return [
        partial(open_content, replace(task, run=str(run)), given_settings)
        for run, _ in find_blocks("circuit_tracer_features", task, given_settings).values()
    ]


def write_circuit_tracer_features(
    openers: list[Callable[[], DashboardContent]], folder: Path
) -> None:
    """Write the features of each SAE, opening one SAE at a time."""
    index = {}
    for opener in openers:
        content = opener()
        layer, offsets = content.name.layer, [0]
        file = folder / f"layer_{layer}.bin"
        with open(file, "wb") as stream:
            for dashboards in list_dashboards(content):
                for dashboard in dashboards:
                    text = json.dumps(_make_entry(content, dashboard), allow_nan=False)
                    packed = zlib.compress(text.encode())
                    stream.write(len(packed).to_bytes(4, "little") + packed)
                    offsets.append(stream.tell())
        index[str(layer)] = {"filename": file.name, "offsets": offsets}
    (folder / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode()))


def _make_entry(content: DashboardContent, dashboard: Dashboard) -> dict[str, Any]:
    layer, feature = content.name.layer, dashboard["feature_index"]
    maximum = content.catalogue.statistics.maximum[feature].item()
    groups = groupby(
        dashboard["activations"], key=lambda example: (example["bin_min"], example["bin_max"])
    )
    quantiles = [
        {
            # bin_min is -1 for the strongest examples
            "quantile_name": "Top" if low < 0 else f"Interval {low:.3g} - {high:.3g}",
            "examples": [
                {
                    "tokens": example["tokens"],
                    "tokens_acts_list": example["values"],
                    "train_token_ind": example["qualifying_token_index"],
                    "is_repeated_datapoint": False,
                }
                for example in examples
            ],
        }
        for (low, high), examples in groups
    ]
    return {
        "transcoder_id": content.name.id,
        "index": pair_cantor(layer, feature),
        "examples_quantiles": quantiles,
        "top_logits": dashboard["pos_str"],
        "bottom_logits": dashboard["neg_str"],
        "act_min": 0.0,
        "act_max": maximum,
        "quantile_values": [],
        "histogram": content.catalogue.linear_histogram[feature].tolist(),  # from 0 to act_max
        "activation_frequency": dashboard["frac_nonzero"],
    }


def pair_cantor(layer: int, feature: int) -> int:
    """Compute circuit-tracer's index of a feature of a block: Cantor's pairing function."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature
