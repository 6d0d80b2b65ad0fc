"""How many times as fast is ours as another tool, at the same work?

ratio = our tokens/s / the other's tokens/s, of one round, in which both see the same machine.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

OURS = "sae_lightning"


class Row(NamedTuple):
    """A tool's variant at one task, in all rounds."""

    architecture: str
    setting: str
    tool: str
    variant: str
    speeds: list[float]
    """Tokens per second, of each round in which it succeeded."""
    ratios: list[float]
    """Of each round in which ours succeeded too; none for ours."""
    l0: float | None


def rows(results: Iterable[dict[str, Any]]) -> list[Row]:
    """The runs of each task (architecture and setting) together, ours first."""
    groups: dict[tuple[str, str, str, str], dict[int, dict[str, Any]]] = {}
    for r in results:
        key = r["architecture"], r["setting"], r["tool"], r["variant"]
        groups.setdefault(key, {})[r["round"]] = r
    found = []
    for key in sorted(groups, key=lambda k: (k[:2], k[2] != OURS, k)):
        runs = groups[key]
        speeds = {n: r["tokens_per_second"] for n, r in runs.items()}
        ours = groups.get((*key[:2], OURS, ""), {}) if key[2] != OURS else {}
        ratios = [ours[n]["tokens_per_second"] / s for n, s in speeds.items() if n in ours]
        found.append(Row(*key, list(speeds.values()), ratios, next(iter(runs.values()))["l0"]))
    return found
