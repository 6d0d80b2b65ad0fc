"""Which runs are of one experiment: an SAE, its repetitions with other seeds, and its controls."""

import json
from collections.abc import Mapping

# Prefixes of the settings that change no number of an SAE by more than rounding.
ONLY_ROUNDING = (
    *("llm.device", "llm.attn", "llm.load.device_map", "llm.load.max_memory", "llm.load.offload_"),
    "data.cache",
    "data.kind",  # follows from the other settings; old checkpoints lack it
    *(f"trainer.{name}" for name in ("accelerator", "devices", "nodes", "split", "patience")),
    *("trainer.threads", "trainer.keep_every"),
    *("logger", "sweep", "plugins", "resume"),
)
# Prefixes of the settings in which the seeds and controls of one experiment may differ.
NOT_COMPARED = (
    *ONLY_ROUNDING,
    *("trainer.products", "trainer.log_every", "trainer.checkpoint_every", "eval.every"),
    *("seed", "data.seed", "model.seed", "model.control"),
)


def identify_experiment(settings: Mapping[str, object]) -> str:
    """Make a key that only the runs of one experiment share. `settings`: all settings of a
    run, by dotted name."""
    compared = {k: v for k, v in settings.items() if not k.startswith(NOT_COMPARED)}
    return json.dumps(compared, sort_keys=True, default=str)
