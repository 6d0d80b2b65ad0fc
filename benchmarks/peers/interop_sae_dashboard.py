"""SAEDashboard for `interop.py`: the classes that read its files (dashboards, no weights)."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

PACKAGE = "sae-dashboard"


def read_dashboards(folder: str) -> dict[str, Any]:
    """Read every batch of dashboards with the tool's classes, and write it again. Returns the
    number of features, and the largest difference between a number in our file and in theirs."""
    features, difference = 0, 0.0
    for file in Path(folder).glob("batch-*.json"):
        content = json.loads(file.read_text("utf8"))
        batch = NeuronpediaDashboardBatch(**content)
        difference = max(difference, _compare(batch.to_dict(), content))
        features += len(batch.features)
    version = importlib.metadata.version(PACKAGE)
    return {"version": version, "features": features, "difference": difference}


def _compare(one: Any, other: Any) -> float:
    """The largest difference between two numbers; ValueError if anything else differs."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return max((_compare(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max(map(_compare, one, other), default=0.0)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return float(abs(one - other))
    if one != other:
        raise ValueError(f"{str(one)[:80]} is {str(other)[:80]} in the file")
    return 0.0
