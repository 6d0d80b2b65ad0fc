"""Which runs belong together: the seeds of an SAE, and its controls."""

import json
from collections.abc import Mapping

# Settings, or prefixes of groups, in which the seeds and controls of one experiment differ, or
# which change nothing about an SAE.
NOT_COMPARED = ("seed", "data.seed", "model.seed", "model.control", "resume", "plugins")
GROUPS_NOT_COMPARED = ("sweep.", "logger.", "trainer.")


def identify_experiment(settings: Mapping[str, object]) -> str:
    """A key that a trained SAE, its repetitions with other seeds and its controls share, from all
    settings by dotted name. (`trainer.tokens` and `trainer.batch` are compared.)"""
    compared = {
        name: value
        for name, value in settings.items()
        if name not in NOT_COMPARED
        and (
            name in ("trainer.tokens", "trainer.batch") or not name.startswith(GROUPS_NOT_COMPARED)
        )
    }
    return json.dumps(compared, sort_keys=True, default=str)
