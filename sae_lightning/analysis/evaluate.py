"""The held-out scorecard of a saved SAE."""

from pathlib import Path

from sae_lightning import scorecard
from sae_lightning.files import write_json
from sae_lightning.llm.sites import Sites
from sae_lightning.sae import SAE
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.stream.synthetic import HeldOutConcepts
from sae_lightning.terminal import console, grid


def evaluate(
    run: Path, sae: SAE, held_out: HeldOut | HeldOutConcepts, sites: Sites
) -> scorecard.Scorecard:
    """Score the SAE of `run` as it was saved, print the card and write `analysis/evaluate.json`."""
    x = held_out.activations(sites.source)
    (card,) = scorecard.score([sae.to(x.device)], held_out, *sites, [sae.weights])
    target = run / "analysis" / "evaluate.json"
    write_json(target, card.scalars() | {"tokens": len(x)})
    console.print(grid(scorecard.rows(card.scalars()), title=scorecard.title(card.scalars())))
    console.print(f"written to {target}")
    return card
