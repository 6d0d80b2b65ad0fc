"""What a sweeper that searches (Optuna) is told about a finished run, and how passes are split."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class SweepConfig:
    """Settings of a multirun as a whole; they change nothing about any SAE."""

    objective: str = "ce_recovered"
    """Held-out metric that a searching sweeper maximises; a minus in front minimises (`-kl`)."""
    l0: float | None = None
    """Judge the objective at this L0: a run with more active features is marked down."""
    max_heads: int | None = None
    """SAEs trained together on one pass of the LLM; null for as many as memory allows."""
